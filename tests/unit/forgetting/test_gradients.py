from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lwf_lightning.data.batch import Batch, batches_of
from lwf_lightning.forgetting import gradients
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss

ARCHITECTURES = ["llama", "llama_tied", "gpt2", "gemma", "qwen2", "gpt_neox", "lora"]


class Wrapped(nn.Module):
    """A language model with something around or inside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class ScaledLogits(Wrapped):
    """A parameter that no module of a known kind owns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits * self.scale
        return output


class UsedOutside(Wrapped):
    """A linear layer's weight that is also used behind its back."""

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        weight = self.model.model.layers[0].self_attn.q_proj.weight
        output.logits = output.logits * (1 + weight.mean())
        return output


class FlatNorm(nn.Module):
    """A norm that loses sight of the texts."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class Checkpointed(nn.Module):
    """A layer that checkpoints whatever its mode."""

    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.use_reentrant = use_reentrant

    def forward(self, hidden: Tensor, **rest: Any) -> Tensor:
        return checkpoint(lambda h: self.layer(h, **rest), hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_every_architecture_equals_the_loop(
    name: str, batch_size: int, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(7)

    fisher = diagonal_fisher(model, batches_of(texts, batch_size, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_one_pass_per_batch(
    name: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    passes = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        passes.append(len(batch["labels"]))
        return per_text_loss(model, batch)

    diagonal_fisher(
        oracle.make_model(name), batches_of(make_texts(7), 3, oracle.PAD), text_loss=counted
    )

    assert passes == [3, 3, 1]


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("elements", [1, 50, 16 * 5])
def test_blocks_of_any_size_give_the_same(
    name: str,
    elements: int,
    oracle: ModuleType,
    make_texts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, texts = oracle.make_model(name), make_texts(5)
    whole = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))
    monkeypatch.setitem(gradients.BLOCK_ELEMENTS, "cpu", elements)

    in_blocks = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(in_blocks, {key: value.double() for key, value in whole.items()})


@pytest.mark.parametrize("elements", [1, 13, 6 * 3 * 2, 10**6])
def test_row_slices_cover_every_row_once(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradients.BLOCK_ELEMENTS, "cpu", elements)
    matrix = torch.arange(21.0).view(7, 3)

    slices = list(gradients.row_slices(matrix, texts=2))

    torch.testing.assert_close(torch.cat([matrix[rows] for rows in slices]), matrix)
    assert all((rows.stop - rows.start) * 3 * 2 <= max(elements, 3 * 2) for rows in slices)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(
    side: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(4)
    padded = []
    for batch in batches_of(texts, 2, oracle.PAD):
        extra = (5, 0) if side == "left" else (0, 5)
        padded.append(
            {
                key: nn.functional.pad(value, extra, value=-100 if key == "labels" else 0)
                for key, value in batch.items()
            }
        )

    fisher = diagonal_fisher(model, padded)

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "lora"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    name: str, use_reentrant: bool, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(4)
    expected = oracle.fisher_oracle(model, texts)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    recomputed = []
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    hook = next(layer.children()).register_forward_hook(lambda *_: recomputed.append(1))

    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD))

    hook.remove()
    assert len(recomputed) == 2  # one batch: forward, and again in its backward
    oracle.assert_near(fisher, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_foreign_checkpointing_changes_nothing(
    use_reentrant: bool, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(4)
    layers = model.model.layers
    layers[1].mlp = Checkpointed(layers[1].mlp, use_reentrant)

    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_module_used_twice_adds_up_before_squaring(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(5)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    assert not any("layers.1.mlp" in name for name in fisher)
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_table_used_twice_adds_up_before_squaring(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    class TwoLookups(nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.table = nn.Embedding(vocabulary, 6, padding_idx=0)
            self.head = nn.Linear(6, vocabulary)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            hidden = self.table(input_ids) * self.table(input_ids.roll(1, dims=1))
            return type("Output", (), {"logits": self.head(hidden)})()

    torch.manual_seed(0)
    model = TwoLookups(37)
    texts = [text for text in make_texts(9) if len(text) == 8] or make_texts(1)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


@pytest.mark.parametrize("wrapper", [ScaledLogits, UsedOutside])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_parameters_without_a_rule_take_the_slower_path(
    wrapper: type[Wrapped], batch_size: int, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = wrapper(oracle.make_model("llama_tied")), make_texts(5)

    fisher = diagonal_fisher(model, batches_of(texts, batch_size, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_module_that_loses_sight_of_the_texts(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(5)
    model.model.norm = FlatNorm(model.model.norm)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_frozen_parameters_are_left_out(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    assert all("layers.1" in name for name in fisher)
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_parameter_that_takes_no_part_gets_zeros(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("llama")
    model.spare = nn.Linear(3, 2)

    fisher = diagonal_fisher(model, batches_of(make_texts(2), 2, oracle.PAD))

    assert fisher["spare.weight"].shape == (2, 3)
    assert not fisher["spare.weight"].any()
    assert fisher["lm_head.weight"].any()


@pytest.mark.parametrize("wrapper", [Wrapped, ScaledLogits])
def test_the_model_is_left_as_it_was(
    wrapper: type[Wrapped], oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = wrapper(oracle.make_model("gpt2"))
    batch = next(batches_of(make_texts(3), 3, oracle.PAD))
    model.model.transformer.h[0].eval()
    model.model.transformer.wpe.weight.requires_grad_(False)
    per_text_loss(model, batch).sum().backward()
    kept = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    pointers = {
        n: p.grad if p.grad is None else p.grad.data_ptr() for n, p in model.named_parameters()
    }
    modes = {name: module.training for name, module in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}

    fisher = diagonal_fisher(model, [batch])
    forgetting_confidence(model, [batch], fisher=fisher, anchor=oracle.nearby_weights(model))

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == trains[name]
        assert (parameter.grad is None) == (kept[name] is None)
        if parameter.grad is not None:
            assert parameter.grad.data_ptr() == pointers[name]
            torch.testing.assert_close(parameter.grad, kept[name], rtol=0, atol=0)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_is_left_as_it_was_after_an_error(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("llama")

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        per_text_loss(model, batch)
        raise RuntimeError("broken loss")

    with pytest.raises(RuntimeError, match="broken loss"):
        diagonal_fisher(model, batches_of(make_texts(2), 2, oracle.PAD), text_loss=broken)

    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_it_works_where_gradients_are_off(
    mode: Callable[[], Any], name: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(3)

    anchor, batches = oracle.nearby_weights(model), list(batches_of(texts, 3, oracle.PAD))
    with mode():
        inside = list(batches_of(texts, 3, oracle.PAD))
        fisher = diagonal_fisher(model, inside)
        scores = forgetting_confidence(model, inside, fisher=fisher, anchor=anchor)

    expected = forgetting_confidence(model, batches, fisher=fisher, anchor=anchor)
    torch.testing.assert_close(scores.confidence, expected.confidence)
    assert not any(value.is_inference() for value in (*fisher.values(), scores.alignment))
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_bfloat16_and_autocast_come_near(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    texts = make_texts(6)
    expected = oracle.fisher_oracle(oracle.make_model("llama_tied"), texts)
    half = oracle.make_model("llama_tied").to(torch.bfloat16)
    from_half = diagonal_fisher(half, batches_of(texts, 3, oracle.PAD))
    with torch.autocast("cpu", torch.bfloat16):
        from_autocast = diagonal_fisher(
            oracle.make_model("llama_tied"), batches_of(texts, 3, oracle.PAD)
        )

    for name, value in expected.items():
        for found in (from_half[name], from_autocast[name]):
            assert found.dtype == torch.float32
            assert (found - value).norm() < 0.1 * value.norm()


def test_a_loss_of_ones_own(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(4)

    fisher = diagonal_fisher(
        model,
        batches_of(texts, 4, oracle.PAD),
        text_loss=lambda m, batch: 3 * per_text_loss(m, batch),
    )

    expected = oracle.fisher_oracle(model, texts)
    oracle.assert_near(fisher, {name: 9 * value for name, value in expected.items()})


def test_a_text_without_a_label_is_named(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    batches = list(batches_of(make_texts(6), 2, oracle.PAD))
    batches[1]["labels"][1] = -100

    with pytest.raises(ValueError, match=r"batch 1, row 1 .* no label"):
        diagonal_fisher(oracle.make_model("llama"), batches)


def test_a_label_on_the_first_token_only_is_no_label(oracle: ModuleType) -> None:
    ids = torch.tensor([[5, 6, 7]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([[5, -100, -100]]),
    }

    with pytest.raises(ValueError, match="batch 0, row 0"):
        diagonal_fisher(oracle.make_model("llama"), [batch])


def test_a_loss_that_is_not_finite_is_named(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        values = per_text_loss(model, batch)
        return torch.where(batch["input_ids"][:, 0] == 36, values / 0, values)

    batches = list(batches_of(make_texts(6), 2, oracle.PAD))
    batches[1]["input_ids"][1, 0] = 36

    with pytest.raises(ValueError, match=r"loss of text 3 .* is inf"):
        diagonal_fisher(oracle.make_model("llama"), batches, text_loss=loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: per_text_loss(m, b).mean(), r"one value per text, shape \(2,\), got \(\)"),
        (lambda m, b: per_text_loss(m, b).detach(), "depends on no trainable parameter"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(
    loss: Any, message: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(
            oracle.make_model("llama"),
            batches_of(make_texts(2), 2, oracle.PAD),
            text_loss=loss,
        )


def test_nothing_to_do_is_an_error(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model = oracle.make_model("llama")
    with pytest.raises(ValueError, match="`batches` is empty"):
        diagonal_fisher(model, [])
    with pytest.raises(ValueError, match="no trainable parameter"):
        diagonal_fisher(model.requires_grad_(False), batches_of(make_texts(2), 2, oracle.PAD))
