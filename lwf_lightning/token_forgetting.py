"""Token-level forgetting: a learning loss that unlearns the less useful tokens of its own batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from lwf_lightning.named import build_by_name

LearningLossName: TypeAlias = Literal["cross_entropy", "token_forgetting"]


def better_tokens(quality: Tensor, share_kept: float) -> Tensor:
    """Which tokens are learned: the given share with the highest quality.

    Args:
        quality: Shape (tokens,), higher is better.
        share_kept: Share of the tokens, in (0, 1], rounded to whole tokens, at least one. All
            that are as good as the last of them are learned with it, so that the order of the
            tokens does not matter.

    Returns:
        Shape (tokens,), bool.

    Example:
        >>> import torch
        >>> better_tokens(torch.tensor([0.1, 0.9, 0.5, -0.2]), 0.5)
        tensor([False,  True,  True, False])
    """
    if len(quality) == 0:
        return quality.bool()  # the mean of none is NaN, and the step is skipped
    count = max(1, round(share_kept * len(quality)))
    return quality >= quality.topk(count).values[-1]


def token_forgetting_loss(token_losses: Tensor, is_better: Tensor, weight: float) -> Tensor:
    """Mean loss of the better tokens, minus the weighted mean loss of the rest (arXiv 2508.04329).

    Args:
        token_losses: Negative log-likelihood of each token, shape (tokens,).
        is_better: Shape (tokens,), bool; at least one.
        weight: lambda(step) of the paper, at least 0.

    Returns:
        A scalar, to be minimized; it has no lower bound where ``weight`` is above 0.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 3.0, 5.0])
        >>> token_forgetting_loss(losses, torch.tensor([True, True, False]), weight=0.1)
        tensor(1.5000)
    """
    kept = token_losses[is_better].mean()
    if bool(is_better.all()):
        return kept
    return kept - weight * token_losses[~is_better].mean()


class TokenForgetting:
    """The learning loss of arXiv 2508.04329, with a quality that needs no model beside the run's.

    The paper scores tokens beforehand, by what fine-tuning a reference model on other texts does
    to their loss. Here a token's quality is how much lower its loss is now than in the base model
    (ours): what training so far has taught about it. It is ranked within the step's
    batch, over all ranks, in every step, at the price of a forward pass of the base model, with
    the same dropout. As long as the weights are the base model's all tokens are as good, and all
    are learned.

    Args:
        share_kept: Share of the tokens that is learned, in (0, 1]; 1 is plain fine-tuning.
        weight_start: lambda before the first step, at least 0.
        weight_end: lambda after the last step, at least 0; in between it changes linearly. Both
            defaults are ours.
    """

    def __init__(
        self, share_kept: float = 0.7, weight_start: float = 0.0, weight_end: float = 0.05
    ) -> None:
        if not 0 < share_kept <= 1:
            raise ValueError(f"share_kept must lie in (0, 1], got {share_kept}")
        for name, weight in (("weight_start", weight_start), ("weight_end", weight_end)):
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0, got {weight}")
        self.share_kept, self.weights = share_kept, (weight_start, weight_end)

    def weight(self, progress: float) -> float:
        """The weight (lambda) when a share ``progress`` of the run is done, 0 to 1.

        Example:
            >>> TokenForgetting(weight_start=0.2, weight_end=0.1).weight(0.5)
            0.15000000000000002
        """
        start, end = self.weights
        return start + (end - start) * progress

    def __call__(self, losses: Tensor, base_losses: Tensor, progress: float) -> Tensor:
        """The loss of a step.

        Args:
            losses: Negative log-likelihood of each token of the step, shape (tokens,).
            base_losses: The same under the base model.
            progress: Share of the run that is done, 0 to 1.
        """
        is_better = better_tokens(base_losses - losses.detach(), self.share_kept)
        return token_forgetting_loss(losses, is_better, self.weight(progress))


def build_learning_loss(
    name: str, options: Mapping[str, float] | None = None
) -> TokenForgetting | None:
    """Builds a learning loss by its name; None is the plain cross-entropy.

    Raises:
        ValueError: If the name or an option is unknown, or a value is out of range.
    """
    known: dict[str, Callable[..., TokenForgetting | None]] = {
        "cross_entropy": lambda: None,
        "token_forgetting": TokenForgetting,
    }
    return build_by_name("learning loss", known, name, options)
