"""Gradient ascent on the text's own loss (the paper's unlearning step)."""

from __future__ import annotations

from torch import Tensor

from lwf_lightning.losses import LabelledTokens
from lwf_lightning.objectives.base import Objective


class GradientAscent(Objective):
    """Minus the mean negative log-likelihood per token (step 5 of arXiv 2505.19715).

    It has no lower bound: a ceiling per text has to stop it.
    """

    def __call__(self, tokens: LabelledTokens, reference: Tensor | None = None) -> Tensor:
        """See :class:`Objective`; in nats per token, at most 0."""
        return -tokens.per_text(tokens.token_losses())
