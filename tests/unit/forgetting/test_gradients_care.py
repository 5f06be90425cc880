from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from lwf_lightning.data.batch import Batch, batches_of
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss


@pytest.mark.parametrize("wrapper", ["Wrapped", "ScaledLogits"])
def test_the_model_is_left_as_it_was(
    wrapper: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = getattr(oracle, wrapper)(oracle.make_model("gpt2"))
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

    with pytest.raises(NonFiniteLossError, match=r"loss of text 3 .* is inf"):
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


def test_dropout_that_a_layer_reads_from_its_configuration_is_off(
    make_texts: Callable[..., Any],
) -> None:
    config = FalconConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        parallel_attn=False,
        attention_dropout=0.5,
    )
    torch.manual_seed(0)
    model = FalconForCausalLM(config)
    batches = list(batches_of(make_texts(4), 2, 0))
    torch.testing.assert_close(
        diagonal_fisher(model.train(), batches), diagonal_fisher(model.eval(), batches)
    )
