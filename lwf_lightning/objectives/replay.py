"""Replay: the control experiment, descent on the forget set."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lwf_lightning.losses import LabelledTokens
from lwf_lightning.objectives.base import Objective


class Replay(Objective):
    """The mean negative log-likelihood per token: the forget set is rehearsed, not forgotten.

    If replay helps as much as ascent, forgetting is not what helped (ours, a control).
    """

    ascends: ClassVar[bool] = False

    def __call__(self, tokens: LabelledTokens, reference: Tensor | None = None) -> Tensor:
        """See :class:`Objective`; in nats per token, at least 0."""
        return tokens.per_text(tokens.token_losses())
