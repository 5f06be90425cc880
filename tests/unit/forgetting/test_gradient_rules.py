from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import batches_of
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
