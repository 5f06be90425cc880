"""L2-SP: weight decay towards the base model."""

from __future__ import annotations

from lwf_lightning.regularizers.base import WeightPull


class L2SP(WeightPull):
    """strength / 2 * ||theta - theta_base||^2 (Li et al., ICML 2018, arXiv 1802.01483).

    The paper's second term, plain weight decay of a new head, has no object here. The paper pulls
    to the base model *instead* of to zero: so does a run with ``weight_decay=0``; the module's
    default decays towards zero, too.

    Args:
        strength: alpha of the paper, above 0; the default is ours.
    """

    def __init__(self, strength: float = 1e-3) -> None:
        super().__init__(strength)
