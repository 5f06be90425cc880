"""Select the forget set D_U from scored self-knowledge (step 4 of the paper)."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lwf_lightning.named import check_name

SelectionStrategy: TypeAlias = Literal["highest", "lowest", "random", "all", "threshold"]


def select_forget_set(
    confidence: Tensor,
    *,
    strategy: SelectionStrategy = "highest",
    forgetting_rate: float = 0.125,
    threshold: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Picks the texts to unlearn (D_U, step 4 of arXiv 2505.19715).

    Args:
        confidence: Forgetting confidence FC of each text, shape (texts,); a constant added to
            all of them changes nothing except under ``threshold``.
        strategy: ``highest`` is the paper's. ``lowest``, ``random`` and ``all`` are its
            ablations. ``threshold`` (ours) takes every text at or above ``threshold``.
        forgetting_rate: Share of the texts to take, in (0, 1], rounded up; used by ``highest``,
            ``lowest`` and ``random``. The default is ours (docs/results/world.md).
        threshold: Lowest confidence to take, needed by ``threshold`` and by no other strategy.
        seed: Seed of ``random``.

    Returns:
        Indices into ``confidence``, int64, highest confidence first; ties keep their order. May
        be empty under ``threshold`` only.

    Raises:
        ValueError: If there is no text, a value is not finite, ``strategy`` is unknown, the rate
            is outside (0, 1], or ``threshold`` and ``strategy`` do not fit together.

    Example:
        >>> confidence = torch.tensor([0.1, 0.9, 0.5, 0.7])
        >>> select_forget_set(confidence, forgetting_rate=0.5).tolist()
        [1, 3]
        >>> select_forget_set(confidence, strategy="lowest", forgetting_rate=0.25).tolist()
        [0]
    """
    if confidence.ndim != 1 or confidence.numel() == 0:
        raise ValueError(
            f"confidence must hold one value per text, got shape {tuple(confidence.shape)}"
        )
    if not bool(torch.isfinite(confidence).all()):
        raise ValueError("confidence holds NaN or infinite values; the texts cannot be ranked")
    check_selection(strategy, forgetting_rate, threshold)

    descending = torch.argsort(confidence, descending=True, stable=True)
    # rounded first: 0.07 * 100 is a little more than 7
    count = max(1, math.ceil(round(forgetting_rate * confidence.numel(), 9)))
    if strategy == "highest":
        return descending[:count]
    if strategy == "lowest":
        return descending[-count:]
    if strategy == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.zeros(confidence.numel(), dtype=torch.bool)
        chosen[torch.randperm(confidence.numel(), generator=generator)[:count]] = True
        return descending[chosen.to(descending.device)[descending]]
    if threshold is not None:
        return descending[confidence[descending] >= threshold]
    return descending  # all


def check_selection(
    strategy: SelectionStrategy, forgetting_rate: float, threshold: float | None
) -> None:
    """Raises ``ValueError`` unless the strategy is known and the other two fit it."""
    check_name("selection strategy", strategy, get_args(SelectionStrategy))
    if not 0 < forgetting_rate <= 1:
        raise ValueError(f"forgetting_rate must lie in (0, 1], got {forgetting_rate}")
    if (threshold is None) == (strategy == "threshold"):
        raise ValueError("give `threshold` with strategy 'threshold', and only with it")
    if threshold is not None and math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold}")
