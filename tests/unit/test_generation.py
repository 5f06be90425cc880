from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from lwf_lightning.data.batch import EncodedText
from lwf_lightning.data.training import warn_of_unsteady
from lwf_lightning.generation import (
    _cut,
    eos_token_ids,
    evaluation_mode,
    generate_answers,
    steady_positions_of,
)

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}
LETTERS = "abcdefghijklmnopqrstuvwxyz ?:.\n"


def letter_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per character, a few of several, and ids 0 to 2 for <pad>, <bos> and <eos>."""
    pieces = ["<pad>", "<bos>", "<eos>", *LETTERS, "q:", ".\n", "\u00e9"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def prompts(count: int = 7, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, 37, (n,), generator=generator).tolist()) for n in lengths]


def by_hand(model: Any, prompt: tuple[int, ...], new: int, eos: int | None) -> tuple[int, ...]:
    ids = list(prompt)
    with evaluation_mode(model), torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == eos:
                break
    return tuple(ids[len(prompt) :])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer(**SPECIAL)


def answers_of(model: Any, tokenizer: Any, **changes: Any) -> list[tuple[int, ...]]:
    settings: dict[str, Any] = {"max_new_tokens": 9, "batch_size": 3, **changes}
    return generate_answers(model, tokenizer, settings.pop("prompt_ids", prompts()), **settings)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_equals_greedy_decoding_by_hand(
    make_llama: Callable[..., Any], tokenizer: Any, batch_size: int
) -> None:
    model = make_llama(seed=3)
    expected = [by_hand(model, prompt, 9, 2) for prompt in prompts()]
    assert any(answer[-1] == 2 and len(answer) < 9 for answer in expected)  # some end early,
    assert any(len(answer) == 9 for answer in expected)  # some do not
    assert answers_of(model, tokenizer, batch_size=batch_size) == expected


def test_learned_positions_are_counted_from_the_first_real_token(tokenizer: Any) -> None:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2
    )
    model = GPT2LMHeadModel(config)
    expected = [by_hand(model, prompt, 9, 2) for prompt in prompts()]
    assert answers_of(model, tokenizer, batch_size=4) == expected


def test_without_pad_and_eos_token(make_llama: Callable[..., Any]) -> None:
    model = make_llama(seed=3)
    model.generation_config.eos_token_id = None
    expected = [by_hand(model, prompt, 9, None) for prompt in prompts()]
    assert answers_of(model, letter_tokenizer()) == expected


def test_every_end_of_text_id_counts(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    model = make_llama(seed=3)
    free = [by_hand(model, prompt, 9, None) for prompt in prompts()]
    third = free[0][2]
    model.generation_config.eos_token_id = [third]
    assert eos_token_ids(model, tokenizer) == tuple(sorted({2, third}))
    ends = [[i for i, token in enumerate(answer) if token in (2, third)] for answer in free]
    expected = [answer[: (*at, 8)[0] + 1] for answer, at in zip(free, ends, strict=True)]
    assert answers_of(model, tokenizer) == expected


def test_the_models_own_generation_settings_do_not_matter(
    make_llama: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama(seed=3)
    expected = answers_of(model, tokenizer)
    own = model.generation_config
    own.update(
        do_sample=True,
        temperature=3.0,
        top_k=2,
        top_p=0.4,
        repetition_penalty=9.0,
        num_beams=3,
        no_repeat_ngram_size=1,
        suppress_tokens=[expected[0][0]],
        max_length=4,
        min_new_tokens=9,
        use_cache=False,
    )
    before = own.to_dict()
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert answers_of(model, tokenizer) == expected
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    assert model.generation_config is own
    assert own.to_dict() == before


def test_mode_of_every_submodule_is_restored(
    make_llama: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_llama()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert answers_of(model, tokenizer) == answers_of(model, tokenizer)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_gradient_checkpointing_changes_nothing(
    make_llama: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama(seed=3)
    expected = answers_of(model, tokenizer)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    transformers_logging.enable_propagation()
    try:
        assert answers_of(model, tokenizer) == expected
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_lora_layers_take_part(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    model = make_llama(seed=3)
    plain = answers_of(model, tokenizer)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    assert answers_of(wrapped, tokenizer) == plain  # the adapter starts at zero
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = [by_hand(wrapped, prompt, 9, 2) for prompt in prompts()]
    assert expected != plain
    assert answers_of(wrapped, tokenizer) == expected


def test_a_prefix_outside_of_the_layers_is_refused(
    make_llama: Callable[..., Any], tokenizer: Any
) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match=r"PREFIX_TUNING lies outside .* without it\. Take LoRA"):
        answers_of(get_peft_model(make_llama(seed=3), config), tokenizer)


def test_bfloat16(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    model = make_llama(seed=3).bfloat16()
    answers = answers_of(model, tokenizer, max_new_tokens=2)
    assert [len(answer) in (1, 2) for answer in answers] == [True] * 7


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("with_eos", [True, False])
def test_stop_strings_end_each_answer_by_itself(
    make_llama: Callable[..., Any], batch_size: int, with_eos: bool
) -> None:
    tokenizer = letter_tokenizer(**(SPECIAL if with_eos else {}))
    model = make_llama(seed=3)
    model.generation_config.eos_token_id = None
    free = [by_hand(model, prompt, 9, 2 if with_eos else None) for prompt in prompts()]
    texts = [str(tokenizer.decode(list(answer))) for answer in free]
    stop = [texts[0][3:5], texts[1][5]]

    expected = []
    for answer in free:
        size, text = 0, ""
        while size < len(answer) and not any(string in text for string in stop):
            size += 1
            text = str(tokenizer.decode(list(answer[:size])))
        place = min([text.find(string) for string in stop if string in text], default=len(text))
        while len(str(tokenizer.decode(list(answer[:size])))) > place:
            size -= 1
        expected.append(answer[:size])

    assert expected != free
    assert answers_of(model, tokenizer, batch_size=batch_size, stop=stop) == expected


def test_generation_ends_when_every_row_has_met_a_stop_string(
    make_llama: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_llama(seed=3)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    answers_of(model, tokenizer, max_new_tokens=40, batch_size=7, stop=list(LETTERS))
    assert len(steps) < 10


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("yes\nq: no", ["\nq:"], "yes"),
        ("yes.\nq: no", ["\nq:"], "yes"),  # the token ".\n" holds a part of the stop string
        ("\nq:", ["\nq:"], ""),
        ("yes\nq", ["\nq:"], "yes\nq"),
        ("abcdef", ["cd", "bcde"], "ab"),  # "cd" is complete first
        ("yes<eos>q:", ["q:"], "yes<eos>"),
        ("yesq:<eos>", ["q:"], "yes"),
        ("yes<eos>", ["<eos>"], "yes"),
        ("a\u00e9q:", ["q:"], "a\u00e9"),
        ("yes", [], "yes"),
        ("", ["q:"], ""),
    ],
)
def test_cut(tokenizer: Any, text: str, stop: list[str], kept: str) -> None:
    vocabulary = tokenizer.get_vocab()
    ids = []
    while text:
        piece = max((p for p in vocabulary if text.startswith(p)), key=len)
        ids.append(vocabulary[piece])
        text = text.removeprefix(piece)
    assert tokenizer.decode(list(_cut(ids, tokenizer, [2], stop))) == kept


def test_no_prompts(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    assert answers_of(make_llama(), tokenizer, prompt_ids=[]) == []


def test_progress_bar_only_when_asked_for(
    make_llama: Callable[..., Any], tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    answers_of(make_llama(), tokenizer)
    assert capfd.readouterr() == ("", "")
    answers_of(make_llama(), tokenizer, progress=True, description="Answering")
    assert "Answering: 100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"stop": "\nq:"}, "stop must be a list of strings"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"prompt_ids": [(5,), ()]}, "prompt 1 has no tokens"),
    ],
)
def test_bad_input(
    make_llama: Callable[..., Any], tokenizer: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        answers_of(make_llama(), tokenizer, **changes)


@pytest.mark.parametrize(("kind", "expected"), [("default", None), ("longrope", 8), ("yarn", None)])
def test_how_long_a_text_may_be_before_it_changes_how_others_are_read(
    kind: str, expected: int | None
) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        rope_parameters=rope | factors | {"original_max_position_embeddings": 8},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    steady = steady_positions_of(model)
    assert steady == expected
    short, long = torch.arange(1, 8), torch.arange(1, 13)
    row = torch.nn.functional.pad(short, (0, 5))
    with torch.no_grad():
        alone = model(short[None]).logits[0]
        together = model(torch.stack([row, long])).logits[0, :7]
    assert torch.allclose(alone, together, atol=1e-5) is (expected is None)


def test_texts_beyond_that_are_warned_of() -> None:
    texts = [EncodedText((1,) * 5, (1,) * 5), EncodedText((1,) * 9, (1,) * 9)]
    with pytest.warns(UserWarning, match=r"qasc have up to 9 tokens.*max_length=12 to 8"):
        warn_of_unsteady(texts, 8, "qasc", 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unsteady(texts, 9, "qasc", 12)
        warn_of_unsteady(texts, None, "qasc", 12)
