from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import batches_of
from lwf_lightning.forgetting import gradient_rules
from lwf_lightning.forgetting.fisher import diagonal_fisher


class _Scale(torch.autograd.Function):
    """A product as a fused kernel writes it: torch.func cannot look inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, backprop: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        return backprop * weight, (backprop * hidden).flatten(0, -2).sum(dim=0)


class FusedScale(nn.Module):
    """A module of one vector whose forward vmap refuses."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return _Scale.apply(hidden, self.weight)


class Mixed(nn.Module):
    """A module of one vector that mixes what it multiplies: no product with its weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden * self.weight).cumsum(dim=-1) / 4


class OfTokens(nn.Module):
    """A vector that stands for the second dimension, as PReLU's does."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.PReLU(size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.transpose(1, 2)).transpose(1, 2)


class FlatNorm(nn.Module):
    """A norm that loses sight of the texts."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


@pytest.mark.parametrize("wrapper", ["ScaledLogits", "UsedOutside"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_parameters_without_a_rule_take_the_slower_path(
    wrapper: str, batch_size: int, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = getattr(oracle, wrapper)(oracle.make_model("llama_tied")), make_texts(5)

    fisher = diagonal_fisher(model, batches_of(texts, batch_size, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_module_that_loses_sight_of_the_texts(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(5)
    model.model.norm = FlatNorm(model.model.norm)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_norm_that_cannot_be_batched_is_run_text_by_text(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(5)
    model.model.layers[1].input_layernorm = FusedScale(16)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


@pytest.mark.parametrize("kind", ["product", "one weight is 0", "no product", "bfloat16"])
def test_the_gradient_of_a_norm_from_its_output_only_where_that_is_right(
    kind: str,
    oracle: ModuleType,
    make_texts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(7)
    layer = model.model.layers[1]
    for norm in (model.model.norm, layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.data.uniform_(0.5, 1.5)
    if kind == "one weight is 0":
        layer.input_layernorm.weight.data[3] = 0
    if kind == "no product":
        layer.input_layernorm = Mixed(16)
    if kind == "bfloat16":
        model = model.bfloat16()
    found = []
    original = gradient_rules._gradient_of_product
    monkeypatch.setattr(
        gradient_rules,
        "_gradient_of_product",
        lambda module, *rest: (found.append(module), original(module, *rest))[1],
    )

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    if kind != "bfloat16":
        oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))
    times = found.count(layer.input_layernorm)  # three batches
    assert times == {"product": 3, "one weight is 0": 0, "no product": 1, "bfloat16": 0}[kind]


def test_a_vector_that_stands_for_another_dimension(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(4)
    model.model.norm = OfTokens(16)

    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))
