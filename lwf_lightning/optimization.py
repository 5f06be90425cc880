"""Optimizers, the learning-rate schedule, and what a step's loss is divided by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lwf_lightning.data.batch import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

LearningRateSchedule: TypeAlias = Literal["constant", "linear", "cosine"]


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch has an AdamW step for them that goes through each tensor only once."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def build_adamw(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.AdamW:
    """AdamW that decays matrices only; biases and norm weights (one-dimensional) are left alone."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=betas,
        fused=can_fuse(trained) or None,  # None: the next best, which False would rule out
    )
    reset_state(optimizer)
    return optimizer


def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Has AdamW begin anew.

    Where weights are sharded it gets the state that it would give itself at its first step: saving
    it without one would take a step for it, and so change the run.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, DTensor):
                device = parameter.device if group["fused"] else "cpu"
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def build_learning_rate_schedule(
    optimizer: torch.optim.Optimizer,
    kind: LearningRateSchedule,
    *,
    learning_steps: int,
    warmup_ratio: float,
) -> LRScheduler:
    """Linear warm-up, then constant, or falling to zero over the learning steps of the run."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(  # type: ignore[no-any-return]
        name,
        optimizer,
        num_warmup_steps=round(warmup_ratio * learning_steps),
        num_training_steps=learning_steps,
    )


def labelled_token_count(batch: Batch) -> int:
    """Tokens of the batch that carry a loss; the first token of a text never does."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
