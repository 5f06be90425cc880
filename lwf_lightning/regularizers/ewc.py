"""Elastic weight consolidation: a pull to the base model where its knowledge lies."""

from __future__ import annotations

from typing import ClassVar

from lwf_lightning.regularizers.base import WeightPull


class EWC(WeightPull):
    """strength / 2 * sum over i of F[i] * (theta[i] - theta_base[i])^2 (arXiv 1612.00796).

    EWC takes the Fisher information of the old knowledge at the weights that hold it. The texts
    behind the base model's pretraining are not there, so F is the empirical Fisher information of
    its self-knowledge D_self at theta_base, estimated once before the first learning step (ours).
    So D_self is *preserved*: the opposite of what unlearning does to the part of it that it
    chooses. It is the pull to the old task of AFEC (arXiv 2110.12187), without AFEC's second pull
    towards weights that were trained on the new task alone.

    Args:
        strength: lambda of the paper, above 0. F is a mean over texts, of the loss per token of
            each: the gradient of a text's mean. The default is ours.
    """

    needs_fisher: ClassVar[bool] = True

    def __init__(self, strength: float = 100.0) -> None:
        super().__init__(strength)
