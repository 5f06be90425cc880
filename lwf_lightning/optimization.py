"""Optimizers, the learning-rate schedule, and what a step's loss is divided by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from lwf_lightning.data.batch import IGNORE_INDEX, Batch
from lwf_lightning.shards import local, ranks_of_shards

if TYPE_CHECKING:
    import lightning as L

LearningRateSchedule: TypeAlias = Literal["constant", "linear", "cosine"]

_BLOCK = 2**22  # numbers that are turned into float64 at once: 32 MiB


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


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients down, in place, to a norm of at most ``max_norm``.

    Unlike torch's ``clip_grad_norm_`` it adds up in float64. A float32 sum of 10^8 squares is off
    by 5e-4, and depends on how the weights are cut into shards.

    Args:
        parameters: Those of one model, whole or in shards; without a gradient they are left out.
        max_norm: Above 0.

    Returns:
        The norm before, of all shards together, shape (), float32. If it is not finite, the
        gradients are of no use.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    sharded, whole = (torch.zeros((), dtype=torch.float64).to(gradients[0].device) for _ in "ab")
    for gradient in gradients:
        squares = sharded if isinstance(gradient, DTensor) else whole
        for block in torch.split(local(gradient).flatten(), _BLOCK):
            squares += torch.linalg.vector_norm(block.double()).square()
    norm = (ranks_of_shards(gradients).sum(sharded) + whole).sqrt()
    if bool(norm > max_norm):
        for gradient in gradients:
            local(gradient).mul_(float(max_norm / norm))
    return norm.float()


@torch.no_grad()
def share_moved(parameters: Iterable[Tensor], step: float) -> float:
    """Share of the weights that change when so much is added: in bfloat16 rounding undoes the rest.

    Args:
        parameters: Those of one model, whole or in shards, of which this process's count.
        step: How far an optimizer's step moves each, about its learning rate.

    Returns:
        0 to 1; 1 where all weights have at least 32 bits.

    Example:
        >>> share_moved([torch.tensor([1.0, 1e-3], dtype=torch.bfloat16)], 1e-4)
        0.5
    """
    tensors = [local(p) for p in parameters]
    if all(tensor.dtype.itemsize >= 4 for tensor in tensors):
        return 1.0
    moved = sum(int((tensor + step != tensor).sum()) for tensor in tensors)
    return moved / max(1, sum(tensor.numel() for tensor in tensors))


def build_learning_rate_schedule(
    optimizer: torch.optim.Optimizer,
    kind: LearningRateSchedule,
    *,
    learning_steps: int,
    warmup_ratio: float,
) -> LambdaLR:
    """Linear warm-up, then constant, or falling to zero over the learning steps of the run."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(  # type: ignore[no-any-return]
        name,
        optimizer,
        num_warmup_steps=round(warmup_ratio * learning_steps),
        num_training_steps=learning_steps,
    )


def check_optimizers(trainer: L.Trainer, *, unlearns: bool) -> None:
    """Raises ``ValueError`` if an override of configure_optimizers left out what the steps need.

    Args:
        trainer: Has the optimizers and schedulers by now.
        unlearns: Whether the run unlearns.
    """
    found = len(trainer.optimizers)
    intervals = [config.interval for config in trainer.lr_scheduler_configs]
    if found != 1 + unlearns or intervals not in ([], ["step"]):
        raise ValueError(
            f"configure_optimizers must return {'two optimizers' if unlearns else 'one optimizer'} "
            "(of learning and, unless schedule is never, of unlearning) and at most one scheduler, "
            "{'scheduler': ..., 'interval': 'step'}, which every learning step steps; got "
            f"{found} and {intervals}"
        )


def arguments_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the run's arguments say of each parameter group: peak rate, betas and decay."""
    names = ("initial_lr", "betas", "weight_decay")
    return [{n: group[n] for n in names if n in group} for group in optimizer.param_groups]


def take_arguments(optimizer: torch.optim.Optimizer, arguments: list[dict[str, Any]]) -> None:
    """Gives a restored optimizer what :func:`arguments_of` kept; its moments stay."""
    for group, own in zip(optimizer.param_groups, arguments, strict=True):
        group.update(own)


def take_peak_rates(schedule: LambdaLR) -> None:
    """Has a restored schedule go on below its optimizer's peak rates: its place in it stays."""
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    for group, share in zip(groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * share(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]


def labelled_token_count(batch: Batch) -> int:
    """Tokens of the batch that carry a loss; the first token of a text never does."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
