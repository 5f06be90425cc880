from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from lwf_lightning import decoding
from lwf_lightning.decoding import can_decode, decode
from lwf_lightning.generation import generate_answers

NEW = 9
EOS = 2
LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}


def prompts(count: int = 7, seed: int = 0, longest: int = 12) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, 37, (n,), generator=generator).tolist()) for n in lengths]


def by_hand(model: Any, prompt: tuple[int, ...], new: int = NEW) -> tuple[int, ...]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + new and (len(ids) == len(prompt) or ids[-1] != EOS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def decoded(model: Any, of: list[tuple[int, ...]], **changes: Any) -> list[tuple[int, ...]]:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW,
        "batch_size": 3,
        "is_done": lambda ids: ids[-1] == EOS,
        **changes,
    }
    answers = {place: tuple(ids) for place, ids in decode(model, of, **settings)}
    return [answers[place] for place in range(len(of))]


def assert_answers_are_those_by_hand(model: Any) -> None:
    expected = [by_hand(model, prompt) for prompt in prompts()]
    for batch_size in (1, 3):
        answers = generate_answers(
            model, _Tokenizer(), prompts(), max_new_tokens=NEW, batch_size=batch_size
        )
        assert answers == expected


def build(name: str, attention: str = "sdpa", **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = "LMHeadModel" if name in ("GPT2", "XLNet") else "ForCausalLM"
    architecture = getattr(transformers, name.removesuffix("Text") + kind)
    torch.manual_seed(3)
    model = architecture._from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # else most say one token for ever
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture
def llama() -> Any:
    return build("Llama", **LLAMA)


@pytest.fixture
def forwards() -> Callable[[Any], list[int]]:
    """Rows of each forward pass of a model from now on."""

    def watch(model: Any) -> list[int]:
        rows: list[int] = []

        def note(_: Any, __: Any, keywords: dict[str, Any]) -> None:
            rows.append(len(keywords["input_ids"]))

        model.register_forward_pre_hook(note, with_kwargs=True)
        return rows

    return watch


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", LLAMA),
        ("Llama", {**LLAMA, "tie_word_embeddings": True, "attention": "eager"}),
        ("Mistral", {**LLAMA, "sliding_window": 40}),
        ("Qwen3", LLAMA),
        ("Gemma", LLAMA),
        ("Gemma3Text", {**LLAMA, "sliding_window": 40}),
        ("Mixtral", {**LLAMA, "num_local_experts": 4}),
        ("GPT2", GPT),
        ("GPTNeoX", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
        ("GPTJ", {**GPT, "rotary_dim": 4, "attention": "eager"}),
        ("OPT", {**LLAMA, "ffn_dim": 20, "word_embed_proj_dim": 16}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_architectures(name: str, settings: dict[str, Any], batch_size: int) -> None:
    model = build(name, **settings)
    assert can_decode(model, 12 + NEW)
    expected = [by_hand(model, prompt) for prompt in prompts()]
    assert decoded(model, prompts(), batch_size=batch_size) == expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mistral", {**LLAMA, "sliding_window": 8}),
        ("Gemma3Text", {**LLAMA, "sliding_window": 8}),
        (
            "GPTNeo",
            {
                "vocab_size": 37,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 8,
                "attention": "eager",
            },
        ),
        ("Mamba", {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
        ("Bloom", {"vocab_size": 37, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    ],
)
def test_other_models_go_through_generate(name: str, settings: dict[str, Any]) -> None:
    if name in ("Mamba", "Bloom"):
        settings = {**settings, "attention": "eager"}
    model = build(name, **settings)
    assert not can_decode(model, 12 + NEW)
    own = model.generation_config
    assert_answers_are_those_by_hand(model)
    assert model.generation_config is own


ROBERTA = {**LLAMA, "is_decoder": True}
RWKV = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
XLNET = {"vocab_size": 37, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 20}
XLSTM = {"vocab_size": 37, "hidden_size": 16, "num_blocks": 2, "num_heads": 2}
BART = {
    "vocab_size": 37,
    "d_model": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Roberta", {**ROBERTA, "pad_token_id": 1}),  # counts positions from its pad token
        ("XLMRoberta", {**ROBERTA, "pad_token_id": 1}),
        ("Bart", BART),  # counts the padding, too
        ("Rwkv", {**RWKV, "attention": "eager"}),  # reads the padding, too
        ("XLNet", {**XLNET, "attention": "eager"}),  # generates in a way of its own
        ("xLSTM", {**XLSTM, "attention": "eager"}),  # fails in a batch
    ],
)
def test_models_whose_own_ways_are_wrong_are_found_out(name: str, settings: dict[str, Any]) -> None:
    model = build(name, **settings)
    state, own = torch.get_rng_state(), model.generation_config
    assert_answers_are_those_by_hand(model)
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


class _Tokenizer:
    pad_token_id, eos_token_id = 0, EOS

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def test_many_rows_come_and_go(llama: Any, forwards: Callable[[Any], list[int]]) -> None:
    many = prompts(60, seed=1, longest=30)
    expected = [by_hand(llama, prompt) for prompt in many]
    lengths = {len(answer) for answer in expected}
    assert len(lengths) > 4  # rows end at many different times
    rows = forwards(llama)
    assert decoded(llama, many, batch_size=8) == expected
    assert max(rows) == 8
    in_order = sum(max(map(len, expected[i : i + 8])) for i in range(0, 60, 8))
    assert len(rows) < in_order


def test_memory_is_bounded_in_tokens(
    llama: Any, forwards: Callable[[Any], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = [(5,) * 31, (6,) * 31, *[(7, 8)] * 6]
    expected = [by_hand(llama, prompt) for prompt in of]
    monkeypatch.setattr(decoding, "_SLOT_TOKENS", 10)
    rows = forwards(llama)
    assert decoded(llama, of, batch_size=4) == expected
    assert rows[:3] == [1, 1, 1]  # 40 tokens at most: one long prompt alone
    assert max(rows) == 4  # as many short ones as fit
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 4)
    assert decoded(llama, of, batch_size=8) == expected


def test_autocast_may_give_keys_and_values_other_types(llama: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoded(llama, prompts()) == [by_hand(llama, prompt) for prompt in prompts()]


def test_leftover_memory_does_not_matter(llama: Any) -> None:
    expected = [by_hand(llama, prompt) for prompt in prompts()]
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert bool(torch.empty(3).isnan().all())
        assert decoded(llama, prompts()) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_process_without_work_goes_on_until_all_are_done(
    llama: Any, forwards: Callable[[Any], list[int]]
) -> None:
    asked: list[bool] = []

    def five_more_turns() -> Iterator[bool]:
        yield from [True] * 5
        yield False

    turns = five_more_turns()

    def any_left(here: bool) -> bool:
        asked.append(here)
        return here or next(turns)

    expected = decoded(llama, prompts())
    rows = forwards(llama)
    assert decoded(llama, prompts(), any_left=any_left) == expected
    assert len(rows) == len(asked) - 1  # one forward pass per turn, none after the last question
    assert asked[-6:] == [False] * 6
    assert rows[-5:] == [1] * 5
