"""Texts in one row against each of them alone; and models that have to be padded."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from lwf_lightning import packing
from lwf_lightning.data.batch import Batch, EncodedText, collate
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.optimization import labelled_token_count
from lwf_lightning.packing import (
    attend_text_by_text,
    can_attend_text_by_text,
    forward_passes,
    text_by_text,
)

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WIDE_HEADS = {**LLAMA, "head_dim": 8}
GPT2 = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
DROPLESS_GPT2 = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def build(name: str, attention: str = "sdpa", **settings: Any) -> Any:
    """A random model in float64 and training mode whose attention is far from even."""
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    architecture = getattr(transformers, name.removesuffix("Text") + kind)
    torch.manual_seed(3)
    model = architecture._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().train()


def text(length: int, labelled: Sequence[int], seed: int = 0) -> EncodedText:
    draw = random.Random(f"{length} {seed}")
    ids = tuple(draw.randint(3, 36) for _ in range(length))
    return EncodedText(ids, tuple(ids[at] if at in labelled else -100 for at in range(length)))


AWKWARD = {
    "one text": [text(7, [4, 5, 6])],
    "two tokens": [text(2, [1])],
    "unequal": [text(9, [7, 8]), text(2, [1]), text(23, range(1, 23)), text(5, [2, 4])],
    "equal": [text(6, [3, 4, 5], seed) for seed in range(3)],
    "some equal": [text(6, [5]), text(6, [1, 5], 1), text(4, [3]), text(6, [2, 3], 2)],
    "labels on all": [text(6, range(1, 6)), text(4, range(1, 4))],
    "a text without a label": [text(4, []), text(6, [5]), text(1, [])],
}


def losses_of_each(model: Any, texts: Sequence[EncodedText]) -> torch.Tensor:
    """Of each labelled token: every text alone, and all logits."""
    found = []
    for one in texts:
        logits = model(torch.tensor([one.input_ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(one.labels)[1:]
        found.append(functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
    return torch.cat(found)


def gradients(model: Any, losses: torch.Tensor) -> list[torch.Tensor | None]:
    """Of an uneven sum of the losses."""
    model.zero_grad()
    (losses * torch.arange(1, len(losses) + 1)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def flipped(batch: Batch) -> Batch:
    """The same texts padded on the left."""
    rows = {key: value.clone() for key, value in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for value in rows.values():
            value[row] = value[row].roll(value.shape[1] - length)
    return rows


@pytest.mark.parametrize("pads_left", [False, True])
@pytest.mark.parametrize("name", AWKWARD)
def test_texts_in_one_row_are_each_of_them_alone(name: str, pads_left: bool) -> None:
    model, texts = build("Llama", **LLAMA, tie_word_embeddings=True), AWKWARD[name]
    expected = losses_of_each(model, texts)
    wanted = gradients(model, expected)
    batch = flipped(collate(texts, 0)) if pads_left else collate(texts, 0)
    with text_by_text(model, batch) as in_one_row:
        assert in_one_row
        tokens = labelled_tokens(model, batch)
        found = gradients(model, tokens.token_losses())
    torch.testing.assert_close(tokens.token_losses(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    padded = labelled_tokens(model, batch)
    torch.testing.assert_close(tokens.text, padded.text)
    torch.testing.assert_close(tokens.targets, padded.targets)
    assert tokens.texts == padded.texts == len(texts)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", LLAMA),
        ("Llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("GPT2", DROPLESS_GPT2),
        ("GPTNeoX", {**LLAMA, "use_parallel_residual": False}),
        ("Gemma", WIDE_HEADS),
        ("Gemma3Text", {**WIDE_HEADS, "sliding_window": 24}),
        ("Mistral", {**WIDE_HEADS, "sliding_window": 24}),
        ("Qwen2", LLAMA),
        ("Qwen3", WIDE_HEADS),
        ("Phi3", {**LLAMA, "pad_token_id": 0}),
        ("OPT", {**LLAMA, "ffn_dim": 20, "word_embed_proj_dim": 16, "dropout": 0.0}),
    ],
)
def test_architectures(name: str, settings: dict[str, Any], checkpointing: bool) -> None:
    model, texts = build(name, **settings), AWKWARD["unequal"]
    expected = losses_of_each(model, texts)
    wanted = gradients(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(texts, 0)
    with text_by_text(model, batch) as in_one_row:
        assert in_one_row
        losses = labelled_tokens(model, batch).token_losses()
        found = gradients(model, losses)
    rounding = 1e-5 if "Gemma" in name else 1e-11  # its norms are in float32 whatever the weights
    torch.testing.assert_close(losses, expected, rtol=rounding, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)


def test_an_adapter_and_its_base(make_llama: Callable[..., Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make_llama(), config).double().train()
    texts = AWKWARD["unequal"]
    wanted = gradients(model, losses_of_each(model, texts))
    with text_by_text(model, collate(texts, 0)) as in_one_row:
        assert in_one_row
        found = gradients(model, labelled_tokens(model, collate(texts, 0)).token_losses())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


PADDED = [
    ("Llama", {**LLAMA, "attention": "eager"}),
    ("Mistral", {**LLAMA, "sliding_window": 22}),  # the longest text has 23 tokens
    ("Gemma2", {**WIDE_HEADS, "attention": "eager"}),  # caps its scores, as SDPA cannot
    ("Bloom", {"vocab_size": 37, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
    ("Falcon", {**LLAMA, "alibi": True, "attention": "eager"}),
    ("Mamba", {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    ("Nemotron", LLAMA),  # hands nothing on to its attention
    ("Roberta", {**LLAMA, "is_decoder": True, "pad_token_id": 1}),  # counts from its pad token
]


@pytest.mark.parametrize(("name", "settings"), PADDED)
def test_other_models_are_padded(name: str, settings: dict[str, Any]) -> None:
    if name in ("Mamba", "Bloom"):
        settings = {**settings, "attention": "eager"}
    model, texts = build(name, **settings).eval(), AWKWARD["unequal"]
    attention = model.config._attn_implementation
    batch = collate(texts, 0)
    expected = losses_of_each(model, texts).sum()
    with forward_passes(model, batch) as passes:
        assert model.config._attn_implementation == attention
        found = sum(labelled_tokens(model, part).token_losses().sum() for part in passes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # some round to float32


def test_a_model_that_counts_positions_by_itself_is_found_out() -> None:
    model, batch = build("GPT2", **GPT2), collate(AWKWARD["unequal"], 0)
    model.transformer.wpe.register_forward_pre_hook(
        lambda _, given: torch.arange(given[0].numel()).view_as(given[0])
    )
    with text_by_text(model, batch) as in_one_row:
        assert not in_one_row


def test_a_model_of_ones_own_is_padded(make_llama: Callable[..., Any]) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_llama().double()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    model, batch = Own(), collate(AWKWARD["unequal"], 0)
    with forward_passes(model, batch) as passes:
        found = sum(labelled_tokens(model, part).token_losses().sum() for part in passes)
    torch.testing.assert_close(found, losses_of_each(model.inner, AWKWARD["unequal"]).sum())


def test_it_is_for_cpu_alone(make_llama: Callable[..., Any]) -> None:
    assert can_attend_text_by_text(make_llama(), 9, "cpu")
    assert not can_attend_text_by_text(make_llama(), 9, "cuda")


def test_a_model_is_tried_once_and_left_as_it_was(make_llama: Callable[..., Any]) -> None:
    model, batch = make_llama(), collate(AWKWARD["unequal"], 0)
    config, state = copy.deepcopy(model.config), torch.get_rng_state()
    model.model.layers[0].eval()
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].numel()), with_kwargs=True
    )
    for _ in range(2):
        with text_by_text(model, batch):
            assert model.config._attn_implementation == packing.TEXT_BY_TEXT
            assert model.config.to_diff_dict() == config.to_diff_dict()
            labelled_tokens(model, batch)
    assert passes == [3, 4, 7, 39, 39]
    assert [layer.training for layer in model.model.layers] == [False, True]
    with pytest.raises(KeyboardInterrupt), text_by_text(model, batch):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_computed_that_no_text_needs(make_llama: Callable[..., Any]) -> None:
    model, texts = make_llama(), AWKWARD["some equal"]
    rows: dict[str, list[int]] = {"block": [], "head": []}
    model.model.layers[1].mlp.register_forward_hook(
        lambda _, __, out: rows["block"].append(out[..., 0].numel())
    )
    model.lm_head.register_forward_hook(lambda _, __, out: rows["head"].append(out[..., 0].numel()))
    with forward_passes(model, collate(texts, 0)) as passes:
        rows["block"].clear(), rows["head"].clear()
        for part in passes:
            labelled_tokens(model, part)
    assert rows == {"block": [22], "head": [6]}


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("lengths", [[], [5], [1, 4, 4, 2, 4], [3, 3], [1, 1, 1]])
def test_attention_is_that_of_a_mask_of_blocks(lengths: list[int], scaling: float | None) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths) or 6
    query, key, value = (torch.randn(1, heads, tokens, 4).double() for heads in (4, 2, 2))
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    found, weights = attend_text_by_text(
        layer, query, key, value, None, text_lengths=lengths, scaling=scaling
    )
    blocks = torch.block_diag(*[torch.ones(length, length) for length in lengths or [tokens]])
    scores = query @ key.repeat_interleave(2, dim=1).mT * (scaling or 0.5)
    scores = scores.masked_fill(blocks.tril() == 0, -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    assert weights is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_that_of_the_model_and_of_the_seed(checkpointing: bool) -> None:
    """Attention dropout as well, and the same in a recomputed block."""
    batch = collate(AWKWARD["unequal"], 0)

    def run(model: Any, seed: int) -> list[torch.Tensor | None]:
        with text_by_text(model, batch):
            torch.manual_seed(seed)
            return gradients(model, labelled_tokens(model, batch).token_losses())

    model = build("Llama", **LLAMA, attention_dropout=0.5)
    first = run(model, 1)
    other = build("Llama", **LLAMA, attention_dropout=0.5)
    if checkpointing:
        other.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(run(other, 1), first, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(other, 2)[0], first[0])  # type: ignore[arg-type]


@pytest.fixture(params=["sdpa", "sliding"])
def model(request: pytest.FixtureRequest) -> Any:
    """One that takes rows, or passes of similar length."""
    window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
    return build("Qwen2", **LLAMA, **(window if request.param == "sliding" else {}))


def padded_loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("limit", [None, 1, 25, 40])  # the longest text has 30 tokens
def test_the_trajectory_is_that_of_one_padded_pass(
    limit: int | None, model: Any, make_texts: Callable[..., list[EncodedText]]
) -> None:
    batch = collate([*make_texts(5), text(30, range(21, 30))], 0)
    models = [copy.deepcopy(model), model]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    count = labelled_token_count(batch)
    for _ in range(5):
        padded_loss(models[0], batch).backward()
        with forward_passes(models[1], batch, limit) as passes:
            assert limit is None or len(passes) > 1
            for part in passes:
                (labelled_tokens(models[1], part).token_losses().sum() / count).backward()
        one, many = ([p.grad for p in model.parameters()] for model in models)
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    one, many = (list(model.parameters()) for model in models)
    torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("limit", [None, 1])
def test_one_text_is_one_pass(limit: int | None, model: Any) -> None:
    batch = collate([EncodedText((5, 6, 7), (-100, 6, 7))], 0)
    with forward_passes(model, batch, limit) as passes:
        torch.testing.assert_close(passes, [batch])


def test_a_model_that_makes_a_mask_by_itself_is_padded() -> None:
    """Doge's is empty as long as a parameter is 0, as it is to begin with."""
    settings = {k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}
    model = build("Doge", **settings)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.A)
    texts = AWKWARD["unequal"]
    with text_by_text(model, collate(texts, 0)) as is_packed:
        assert not is_packed
    model.zero_grad()
    labelled_tokens(model, collate(texts, 0)).token_losses().sum().backward()
    assert all(layer.self_attn.A.grad.abs().sum() > 0 for layer in model.model.layers)


def test_positions_of_the_batch_are_those_of_the_row() -> None:
    model, batch = build("Llama", **LLAMA), collate(AWKWARD["unequal"], 0)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["labels"]) * 2
    padded = labelled_tokens(model, batch).token_losses()
    of_one_row = batch | {"position_ids": batch["position_ids"][:1]}
    with text_by_text(model, batch) as is_packed:
        assert is_packed
        torch.testing.assert_close(labelled_tokens(model, batch).token_losses(), padded)
        torch.testing.assert_close(labelled_tokens(model, of_one_row).token_losses(), padded)
