"""Draws what ``benchmarks.growth`` measured, with a fitted line for every curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lwf_lightning.files import whole_file

COLOURS = {
    "forward and backward": "#777777",
    "Fisher": "#0072b2",
    "scoring": "#d55e00",
    "learning step": "#009e73",
}
AXES = {
    "texts": "texts (of 16 tokens, 1 M parameters)",
    "tokens": "tokens per text (8 texts, 4 M parameters)",
    "parameters": "parameters (8 texts of 16 tokens)",
    "interval": "unlearning steps per learning step",
}


@dataclass(frozen=True)
class Curve:
    """One curve and the line fitted to it.

    Attributes:
        series: What is on the x axis, a key of :data:`AXES`.
        quantity: ``seconds`` or ``bytes``.
        name: What was measured.
        x: In ascending order.
        y: Seconds, or bytes.
        logarithmic: Whether both axes are.
        slope: Of the line; 1 is linear on logarithmic axes.
        fitted: The line at x.
        r_squared: Share of the variance of y (or its logarithm) that the line explains.
    """

    series: str
    quantity: str
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    logarithmic: bool
    slope: float
    fitted: tuple[float, ...]
    r_squared: float

    @property
    def growth(self) -> float:
        """The slope; on plain axes as a share of where the line begins."""
        return self.slope if self.logarithmic else self.slope / self.fitted[0]

    @property
    def is_step(self) -> bool:
        """Whether no line describes it: memory rises with the first unlearning step, and once."""
        return (self.series, self.quantity) == ("interval", "bytes")

    @property
    def line(self) -> str:
        """The line in words."""
        if self.logarithmic:
            return f"slope {self.slope:.2f}"
        scale, unit = (1e-6, "MB") if self.quantity == "bytes" else (1.0, "s")
        return f"{self.fitted[0] * scale:.3g} + {self.slope * scale:.3g} x {unit}"

    def __str__(self) -> str:
        return f"{self.series} {self.quantity} {self.name}: {self.line}, R² {self.r_squared:.3f}"


def curves_of(points: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Every curve with at least two points."""
    rows = list(points)
    found = []
    for series in AXES:
        own = [row for row in rows if row["series"] == series]
        for quantity in ("seconds", "bytes"):
            for name in own[0][quantity] if len(own) > 1 else ():
                pairs = sorted((_place(series, row), row[quantity][name]) for row in own)
                x, y = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
                is_log = series != "interval"
                slope, fitted, r_squared = fit(x, y, logarithmic=is_log)
                lines = (tuple(values.tolist()) for values in (x, y, fitted))
                across, up, line = lines
                found.append(
                    Curve(series, quantity, name, across, up, is_log, slope, line, r_squared)
                )
    return found


def draw(points: Iterable[Mapping[str, Any]], path: Path) -> list[Curve]:
    """Writes the picture and returns its curves."""
    curves = curves_of(points)
    figure = Figure(figsize=(14, 7), layout="constrained")
    grid = figure.subplots(2, len(AXES), squeeze=False)
    for column, (series, label) in enumerate(AXES.items()):
        for line, quantity in enumerate(("seconds", "bytes")):
            axes = grid[line][column]
            axes.set_xlabel(label, fontsize=9)
            _show(axes, [c for c in curves if (c.series, c.quantity) == (series, quantity)])
    grid[0][0].set_ylabel("CPU seconds, one thread")
    grid[1][0].set_ylabel("peak memory, MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    return curves


def _show(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        scale = 1e-6 if curve.quantity == "bytes" else 1.0
        colour = COLOURS[curve.name]
        y, fitted = (np.array(values) * scale for values in (curve.y, curve.fitted))
        label = curve.name if curve.is_step else f"{curve.name}: {curve.line}"
        axes.plot(curve.x, y, "o", color=colour, markersize=5, label=label)
        if not curve.is_step:
            axes.plot(curve.x, fitted, "-", color=colour, linewidth=1)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    if not curves:
        return
    if curves[0].logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 10 * low:  # a flat curve would fill the panel with its noise
            axes.set_ylim(low / 2, high * 2)
        ticks = (1e6, 1e7, 1e8) if curves[0].series == "parameters" else curves[0].x
        axes.set_xticks(ticks, [_in_words(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _in_words(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value:g}"


def _place(series: str, row: Mapping[str, Any]) -> float:
    if series == "interval":
        return 1 / row["value"] if row["value"] else 0.0
    return float(row["size"] if series == "parameters" else row["value"])


def fit(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], *, logarithmic: bool
) -> tuple[float, np.ndarray[Any, Any], float]:
    """A least-squares line: its slope, its values at x, and the share of variance it explains."""
    across, up = (np.log(x), np.log(y)) if logarithmic else (x, y)
    slope, start = np.polyfit(across, up, 1)
    line = slope * across + start
    rest, total = ((up - line) ** 2).sum(), ((up - up.mean()) ** 2).sum()
    r_squared = 1 - rest / total if total > 0 else 1.0
    return float(slope), np.exp(line) if logarithmic else line, float(r_squared)
