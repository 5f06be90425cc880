"""Draws what ``benchmarks.growth`` measured, with a fitted line for every curve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def draw(points: Iterable[Mapping[str, Any]], path: Path) -> Iterator[str]:
    """Writes the picture; yields a line of text for every curve."""
    rows = list(points)
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    grid = figure.subplots(2, len(AXES), squeeze=False)
    for column, (series, label) in enumerate(AXES.items()):
        found = [row for row in rows if row["series"] == series]
        for line, quantity in enumerate(("seconds", "bytes")):
            axes = grid[line][column]
            axes.set_xlabel(label, fontsize=9)
            yield from _curves(axes, series, quantity, found)
    grid[0][0].set_ylabel("CPU seconds, one thread")
    grid[1][0].set_ylabel("peak memory, MB")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def _curves(
    axes: Axes, series: str, quantity: str, rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    is_log = series != "interval"
    scale = 1e-6 if quantity == "bytes" else 1.0
    for name in rows[0][quantity] if len(rows) > 1 else ():
        points = sorted((_place(series, row), row[quantity][name] * scale) for row in rows)
        x, y = (np.array(values) for values in zip(*points, strict=True))
        slope, fitted, r_squared = fit(x, y, logarithmic=is_log)
        said = f"slope {slope:.2f}" if is_log else f"{fitted[0]:.3g} + {slope:.3g} x"
        text = f"{name}: {said}, R² {r_squared:.3f}"
        axes.plot(x, y, "o", color=COLOURS[name], markersize=5, label=text)
        axes.plot(x, fitted, "-", color=COLOURS[name], linewidth=1)
        yield f"{series:<11}{quantity:<8} {text}"
    if is_log:
        axes.set_xscale("log", base=2 if series != "parameters" else 10)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.5, high * 6)  # room for the legend
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    if axes.lines:
        axes.legend(fontsize=8, loc="upper left", frameon=False)


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
