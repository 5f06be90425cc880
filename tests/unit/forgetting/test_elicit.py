from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lwf_lightning.forgetting.elicit import SelfKnowledge, SelfText, elicit

# the package offers the function under the same name
elicit_module = importlib.import_module("lwf_lightning.forgetting.elicit")

PIECES = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ?:.\n", "!", "-", "="]
PROMPTS = ["who?", "a", "question: why do birds sing?", "no", "what is it?", "zz top", "hi."]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture
def model(make_llama: Callable[..., Any]) -> Any:
    return make_llama(seed=283)  # answers every prompt, some with an end, some without


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the generator was given."""
    calls: list[int] = []
    generate = elicit_module.generate_answers

    def counting(model: Any, tokenizer: Any, prompt_ids: Any, **settings: Any) -> Any:
        calls.append(len(prompt_ids))
        return generate(model, tokenizer, prompt_ids, **settings)

    monkeypatch.setattr(elicit_module, "generate_answers", counting)
    return calls


def ask(model: Any, tokenizer: Any, prompts: Any = PROMPTS, **changes: Any) -> SelfKnowledge:
    settings = {"max_new_tokens": 8, "batch_size": 3, "progress": False, **changes}
    return elicit(model, tokenizer, prompts, **settings)


def test_texts_are_the_models_own_answers(model: Any, tokenizer: Any) -> None:
    knowledge = ask(model, tokenizer, tasks=list("aabbbcc"))
    assert knowledge.dropped == 0
    assert [text.row for text in knowledge.texts] == list(range(7))
    assert [text.task for text in knowledge.texts] == list("aabbbcc")
    assert [text.prompt for text in knowledge.texts] == PROMPTS
    for text in knowledge.texts:
        assert text.prompt_ids == tuple(PIECES.index(letter) for letter in text.prompt)
        assert text.answer == "".join(PIECES[i] for i in text.answer_ids if i > 2)
        encoded = text.encoded()
        assert encoded.input_ids == text.prompt_ids + text.answer_ids
        assert encoded.labels == (-100,) * len(text.prompt_ids) + text.answer_ids
        logits = model.eval()(torch.tensor([encoded.input_ids])).logits[0]
        start = len(text.prompt_ids) - 1
        greedy = logits[start:-1].argmax(-1).tolist()
        assert greedy == list(text.answer_ids)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_batch_size_does_not_matter(model: Any, tokenizer: Any, batch_size: int) -> None:
    assert ask(model, tokenizer, batch_size=batch_size) == ask(model, tokenizer)


def test_empty_answers_are_dropped_and_counted(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    space, line, letter = PIECES.index(" "), PIECES.index("\n"), PIECES.index("q")
    answers = [(2,), (letter, 2), (), (space, line, 2), (0, 0), (space, letter), (line,)]
    monkeypatch.setattr(elicit_module, "generate_answers", lambda *_, **__: answers)
    knowledge = ask(model, tokenizer, cache_dir=tmp_path)
    assert [(text.row, text.answer) for text in knowledge.texts] == [(1, "q"), (5, " q")]
    assert knowledge.dropped == 5
    assert ask(model, tokenizer, cache_dir=tmp_path) == knowledge


def test_stop_strings_end_answers(model: Any, tokenizer: Any) -> None:
    free = ask(model, tokenizer).texts
    stop = free[0].answer[2:4]
    stopped = ask(model, tokenizer, stop=[stop]).texts
    assert stopped[0].answer == free[0].answer[:2]


# ---------------------------------------------------------------------------- prompts


def test_long_prompts_lose_their_start(model: Any, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"3 of 7 prompts are longer than 5 tokens"):
        texts = ask(model, tokenizer, max_prompt_tokens=5).texts
    assert [len(text.prompt_ids) for text in texts] == [4, 1, 5, 2, 5, 5, 3]
    assert [PIECES[i] for i in texts[2].prompt_ids] == list("sing?")
    assert texts[2].prompt == PROMPTS[2]


def test_a_shortened_prompt_keeps_its_begin_of_text(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "<bos>{{ messages[0]['content'] }}-"
    with pytest.warns(UserWarning, match="lost their start"):
        text = ask(
            model, tokenizer, ["question: why?"], max_prompt_tokens=5, chat_template=True
        ).texts[0]
    assert [PIECES[i] for i in text.prompt_ids] == ["<bos>", "h", "y", "?", "-"]


@pytest.mark.parametrize("limit", [None, 25])
def test_prompts_leave_room_for_the_answer(model: Any, tokenizer: Any, limit: Any) -> None:
    # the model has 64 positions
    with pytest.warns(UserWarning, match="1 of 7 prompts are longer than 20 tokens"):
        texts = ask(model, tokenizer, max_new_tokens=44, max_prompt_tokens=limit).texts
    assert len(texts[2].prompt_ids) == 20
    with pytest.raises(ValueError, match=r"max_new_tokens=64 leaves no room .* 64 positions"):
        ask(model, tokenizer, max_new_tokens=64)


def test_chat_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}={{ m['content'] }}{% endfor %}-"
    text = ask(model, tokenizer, ["hi."], chat_template=True).texts[0]
    assert "".join(PIECES[i] for i in text.prompt_ids) == "=hi.-"
    assert text.prompt == "hi."


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "there is no prompt"),
        (["a", " \n"], {}, "the prompt of row 1 is empty"),
        (["a", ""], {"tasks": ["x", "dental"]}, r"the prompt of row 1 \(task dental\) is empty"),
        (["a", "b"], {"tasks": ["x"]}, "tasks names 1 prompts, but there are 2"),
        (["a"], {"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1, got 0"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a"], {"chat_template": True}, "chat template"),
    ],
)
def test_bad_input(
    model: Any, tokenizer: Any, prompts: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(model, tokenizer, prompts, **changes)


# ------------------------------------------------------------------------------ cache


def test_a_second_run_does_not_generate(
    model: Any, tokenizer: Any, generations: list[int], tmp_path: Path
) -> None:
    first = ask(model, tokenizer, cache_dir=tmp_path / "new" / "folder")
    again = ask(copy.deepcopy(model), tokenizer, cache_dir=tmp_path / "new" / "folder")
    assert generations == [7]
    assert again == first
    assert ask(model, tokenizer) == first  # without a cache
    assert generations == [7, 7]


def test_the_cache_survives_saving_and_loading(
    model: Any, tokenizer: Any, generations: list[int], tmp_path: Path
) -> None:
    ask(model, tokenizer, cache_dir=tmp_path)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    loaded_tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    ask(loaded, loaded_tokenizer, cache_dir=tmp_path)
    assert generations == [7]


def test_how_it_is_computed_is_not_part_of_the_fingerprint(
    model: Any, tokenizer: Any, generations: list[int], tmp_path: Path
) -> None:
    ask(model, tokenizer, cache_dir=tmp_path)
    ask(model.eval(), tokenizer, cache_dir=tmp_path, batch_size=1)
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.set_attn_implementation("eager")
    ask(model, tokenizer, cache_dir=tmp_path)
    assert generations == [7]


def _nudge(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 2] += 1e-7


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": [*PROMPTS[:-1], "hi?"]},
        {"prompts": PROMPTS[::-1]},
        {"tasks": ["other"] * 7},
        {"max_new_tokens": 7},
        {"stop": ["a"]},
        {"chat_template": True},
        {"max_prompt_tokens": 3},
        {"weights": _nudge},
        {"weights": lambda model: model.bfloat16()},
        {"weights": lambda model: setattr(model.config, "rms_norm_eps", 0.1)},
        {"weights": lambda model: setattr(model.generation_config, "eos_token_id", 5)},
        {"vocabulary": True},
    ],
)
def test_anything_else_is(
    model: Any, tokenizer: Any, generations: list[int], tmp_path: Path, change: dict[str, Any]
) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    ask(model, tokenizer, cache_dir=tmp_path)
    change = dict(change)
    change.pop("weights", lambda _: None)(model)
    if change.pop("vocabulary", False):
        tokenizer.add_tokens(["new"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ask(model, tokenizer, cache_dir=tmp_path, **change)
    expected = [7] if change == {"chat_template": True} else [7, 7]
    assert generations == expected  # a template that changes no token changes no answer


TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def test_lora_shares_the_base_models_answers(
    model: Any, tokenizer: Any, generations: list[int], tmp_path: Path
) -> None:
    plain = ask(model, tokenizer, cache_dir=tmp_path)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))
    assert ask(wrapped, tokenizer) == plain
    assert ask(wrapped, tokenizer, cache_dir=tmp_path) == plain
    assert generations == [7, 7]
    trains = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trains) == 10
    assert all("lora_" in name for name in trains)


@pytest.mark.parametrize("start", ["pissa", "learned"])
def test_an_adapter_that_changes_the_model_takes_part(
    start: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    plain = ask(model, tokenizer, cache_dir=tmp_path)
    is_learned = start == "learned"
    config = LoraConfig(r=2, target_modules=TARGETS[:2], init_lora_weights=is_learned or start)
    wrapped = get_peft_model(model, config)
    if is_learned:
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter)
    found = ask(wrapped, tokenizer, cache_dir=tmp_path)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert found == ask(merged, tokenizer)
    assert (found == plain) != is_learned  # what PiSSA takes from the weights, it adds again


def test_an_adapter_of_another_kind_takes_part(model: Any, tokenizer: Any) -> None:
    plain = ask(model, tokenizer)
    wrapped = get_peft_model(model, LoHaConfig(r=2, target_modules=TARGETS[:2]))
    for name, parameter in wrapped.named_parameters():
        if ".hada_" in name:
            torch.nn.init.normal_(parameter)
    found = ask(wrapped, tokenizer)
    assert found == ask(copy.deepcopy(wrapped).merge_and_unload(), tokenizer)
    assert found != plain


def test_a_prefix_outside_of_the_layers_is_left_out(model: Any, tokenizer: Any) -> None:
    plain = ask(model, tokenizer)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert ask(get_peft_model(model, config), tokenizer) == plain


def test_another_strength_or_another_adapter_is_asked_anew(
    model: Any, tokenizer: Any, generations: list[int], tmp_path: Path
) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=1, target_modules=TARGETS[:2]))
    wrapped.add_adapter("other", LoraConfig(r=2, lora_alpha=64, target_modules=TARGETS[:2]))
    weights = {name: p for name, p in wrapped.named_parameters() if ".lora_" in name}
    for name, parameter in weights.items():
        torch.nn.init.normal_(parameter)
        parameter.data.copy_(weights[name.replace(".other.", ".default.")])
    weak = ask(wrapped, tokenizer, cache_dir=tmp_path)
    wrapped.set_adapter("other")
    strong = ask(wrapped, tokenizer, cache_dir=tmp_path)
    assert strong != weak
    assert strong == ask(wrapped, tokenizer)
    wrapped.set_adapter("default")
    assert ask(wrapped, tokenizer, cache_dir=tmp_path) == weak
    assert generations == [7, 7, 7]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "\n".join(text.split("\n")[:-2]) + "\n",
        lambda text: text.replace('"who?"', '"how?"'),
        lambda text: "",
        lambda text: text[10:],
        lambda text: "[]\n" + text,
        lambda text: text.split("\n")[0].replace("fingerprint", "finger") + "\n",
    ],
)
def test_a_damaged_file_is_named_and_rebuilt(
    model: Any,
    tokenizer: Any,
    generations: list[int],
    tmp_path: Path,
    damage: Callable[[str], str],
) -> None:
    first = ask(model, tokenizer, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    file.write_text(damage(whole), encoding="utf-8")
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged .*generated again"):
        assert ask(model, tokenizer, cache_dir=tmp_path) == first
    assert generations == [7, 7]
    assert file.read_text(encoding="utf-8") == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(model, tokenizer, cache_dir=tmp_path) == first


def test_the_file_can_be_read_by_a_person(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    knowledge = ask(model, tokenizer, cache_dir=tmp_path, tasks=["birds"] * 7)
    (file,) = tmp_path.iterdir()
    header, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert file.name == header["fingerprint"] + ".jsonl"
    assert header["dropped"] == 0
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["answer"] for row in rows] == [text.answer for text in knowledge.texts]
    assert {row["task"] for row in rows} == {"birds"}


def test_nothing_is_left_behind_when_writing_fails(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        ask(model, tokenizer, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_encoded_labels_only_the_answer() -> None:
    text = SelfText("p", "a", (5, 6, 7), (8, 2), "task", 4)
    assert text.encoded().labels == (-100, -100, -100, 8, 2)
