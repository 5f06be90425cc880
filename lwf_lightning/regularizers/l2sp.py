"""L2-SP: weight decay towards the base model instead of zero."""

from __future__ import annotations

from lwf_lightning.regularizers.base import WeightPull


class L2SP(WeightPull):
    """strength / 2 * ||theta - theta_base||^2 (Li et al., ICML 2018, arXiv 1802.01483).

    The paper's second term, plain weight decay of a new head, has no object here.

    Args:
        strength: alpha of the paper, above 0; the default is ours.
    """

    def __init__(self, strength: float = 0.01) -> None:
        super().__init__(strength)
