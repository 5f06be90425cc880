"""Negative preference optimization and its reference-free variant."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from lwf_lightning.losses import LabelledTokens
from lwf_lightning.objectives.base import Objective


class NPO(Objective):
    """Negative preference optimization (arXiv 2404.05868, equation 3).

    -(2 / beta) log sigmoid(beta (NLL - NLL_base)): gradient ascent that fades as the text
    becomes less likely than under the base model.

    Args:
        beta: Inverse temperature, above 0; towards 0 it becomes gradient ascent.
    """

    needs_reference: ClassVar[bool] = True

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = check_beta(beta)

    def __call__(self, tokens: LabelledTokens, reference: Tensor | None = None) -> Tensor:
        """See :class:`Objective`; at least 0. The likelihoods are summed over tokens."""
        if reference is None:
            raise ValueError("NPO needs the base model's negative log-likelihood as `reference`")
        margin = tokens.per_text(tokens.token_losses(), "sum") - reference
        return -2 / self.beta * logsigmoid(self.beta * margin)


class SimNPO(Objective):
    """NPO without a reference model, normalised by length (arXiv 2410.07163, equation 4).

    -(2 / beta) log sigmoid(beta (NLL / |y| - delta)).

    Args:
        beta: Inverse temperature, above 0.
        delta: Margin in nats per token, at least 0; a larger one forgets further.
    """

    def __init__(self, beta: float = 4.5, delta: float = 0.0) -> None:
        if not delta >= 0:
            raise ValueError(f"delta must be at least 0, got {delta}")
        self.beta, self.delta = check_beta(beta), delta

    def __call__(self, tokens: LabelledTokens, reference: Tensor | None = None) -> Tensor:
        """See :class:`Objective`; at least 0."""
        margin = tokens.per_text(tokens.token_losses()) - self.delta
        return -2 / self.beta * logsigmoid(self.beta * margin)


def check_beta(beta: float) -> float:
    """Returns ``beta``, or raises ``ValueError`` unless it is above 0."""
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    return beta
