"""How a figure is read: which way is better, and in what unit it is told."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """How a figure is read.

    Attributes:
        sign: 1 where higher is better, -1 where lower is.
        unit: What it is told in.
        factor: What a figure is multiplied by to be in that unit.
        digits: Decimals that are shown.
    """

    sign: int
    unit: str
    factor: float
    digits: int

    def told(self, value: float, sign: str = "") -> str:
        """A value in the unit; a ``sign`` of ``+`` shows that of positive ones, too."""
        return format(self.factor * value, f"{sign}.{self.digits}f")

    @property
    def above(self) -> str:
        """How the figure of a method that gains stands to the baseline's."""
        return "minus" if self.sign > 0 else "below"


def measure_of(figure: str) -> Measure:
    """Losses and perplexities are better lower, in units of their own; all else is a share.

    Args:
        figure: Its name, as it is logged.

    Example:
        >>> measure_of("test/loss").unit, measure_of("test/accuracy").told(0.25)
        ('nats', '25.0')
    """
    found = re.search(r"(?:^|[/_])(loss|nll|perplexity)$", figure)
    if found is None:
        return Measure(sign=1, unit="points", factor=100.0, digits=1)
    unit = "perplexity" if found[1] == "perplexity" else "nats"
    return Measure(sign=-1, unit=unit, factor=1.0, digits=3)
