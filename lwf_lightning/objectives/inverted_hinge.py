"""Inverted hinge loss."""

from __future__ import annotations

from torch import Tensor

from lwf_lightning.losses import LabelledTokens
from lwf_lightning.objectives.base import Objective


class InvertedHinge(Objective):
    """Pushes each token's probability down and its runner-up's up (arXiv 2408.06621).

    The mean over a text's tokens of 1 + p(y_t) - max over v != y_t of p(v). It is bounded, and its
    gradient fades as the runner-up comes near certainty; it does not stop where the two change
    places, so that what ends it is ``unlearning_ceiling``.
    """

    def __call__(self, tokens: LabelledTokens, reference: Tensor | None = None) -> Tensor:
        """See :class:`Objective`; in [0, 2]."""
        logits = tokens.logits.float() if tokens.logits.dtype.itemsize < 4 else tokens.logits
        probability = logits.softmax(dim=-1)
        target = tokens.targets.unsqueeze(1)
        own = probability.gather(1, target).squeeze(1)
        runner_up = probability.scatter(1, target, 0.0).amax(dim=1)
        return tokens.per_text(1 + own - runner_up)
