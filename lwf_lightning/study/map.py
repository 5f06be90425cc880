"""A map of cells: where a method gains, and how much there is to gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lwf_lightning.study.config import Map, Study
from lwf_lightning.study.summary import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gain_map(study: Study, lines: Sequence[Line]) -> Figure | None:
    """The gain of the map's method over the baseline, and beside it that of the ceiling.

    A square per pair of coordinates, with the mean gain in points and half its 95 % interval.
    """
    plan = study.map
    if plan is None:
        return None
    panels = {
        f"{study.label(method)} minus {study.label(study.baseline)}": found
        for method in dict.fromkeys((plan.method, study.ceiling))
        if method and (found := {line.cell: line for line in lines if line.method == method})
    }
    if not panels:
        return None
    from matplotlib.figure import Figure

    xs, ys = (sorted({place[axis] for place in plan.coordinates.values()}) for axis in (0, 1))
    figure = Figure(
        figsize=((1.1 * len(xs) + 1.2) * len(panels) + 1, 0.75 * len(ys) + 1.6),
        layout="constrained",
    )
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    reach = max(abs(100 * line.gain.gain) for own in panels.values() for line in own.values()) or 1
    for axes, (title, own) in zip(every, panels.items(), strict=True):
        _squares(axes, plan, own, (xs, ys), reach)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(plan.x)
    every[0].set_ylabel(plan.y)
    figure.colorbar(every[0].images[0], ax=list(every), label=f"{study.figure}, points", shrink=0.9)
    return figure


def _squares(
    axes: Axes,
    plan: Map,
    lines: Mapping[str, Line],
    ticks: tuple[list[float], list[float]],
    reach: float,
) -> None:
    xs, ys = ticks
    values = [[math.nan] * len(xs) for _ in ys]
    for cell, (x, y) in plan.coordinates.items():
        if cell not in lines:
            continue
        column, row, gain = xs.index(x), ys.index(y), lines[cell].gain
        values[row][column] = 100 * gain.gain
        half = "" if math.isnan(gain.low) else f"\n± {50 * (gain.high - gain.low):.1f}"
        colour = "white" if abs(100 * gain.gain) > 0.65 * reach else "black"
        text = f"{100 * gain.gain:+.1f}{half}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, origin="lower", aspect="auto")
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
