"""Where a method pays: its gain against what varies between the cells of a study."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lwf_lightning.study.config import Study
from lwf_lightning.study.drawn import drawn_label, literal
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.summary import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gain_map(study: Study, lines: Sequence[Line]) -> Figure | None:
    """A panel per factor of the study's map: each method's gain against the factor.

    Bars are 95 % intervals over seeds; values of a factor stand side by side, evenly spaced.
    """
    gains = {(line.method, line.cell): line for line in lines}
    methods = [
        method
        for method in study.methods
        if method != study.baseline and any(method == shown for shown, _ in gains)
    ]
    if not study.map or not methods:
        return None
    from matplotlib.figure import Figure

    columns = min(2, len(study.map))
    rows = math.ceil(len(study.map) / columns)
    names = [drawn_label(study, method, 30) for method in methods]
    beside = min(len(names), 2 * columns)  # two entries of the legend are as wide as a panel
    deep = math.ceil(len(names) / beside) * max(name.count("\n") + 1 for name in names)
    figure = Figure(
        figsize=(4.3 * columns + 0.5, 2.7 * rows + 0.5 + 0.15 * deep), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, (factor, places) in zip(grid, study.map.items(), strict=False):
        _panel(axes, study, methods, places, gains)
        axes.set_xlabel(factor)
    for axes in grid[len(study.map) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=beside, frameon=False, fontsize=8
    )
    measure = measure_of(study.figure)
    told = (
        f"{study.figure} {measure.above} {study.label(study.baseline)}, {measure.unit} "
        "(mean and 95 % interval)"
    )
    for axes in grid[::columns]:
        axes.set_ylabel(literal(textwrap.fill(told, 34)), fontsize=9)
    return figure


def _panel(
    axes: Axes,
    study: Study,
    methods: Sequence[str],
    places: Mapping[str, float],
    gains: Mapping[tuple[str, str], Line],
) -> None:
    factor = measure_of(study.figure).factor
    cells = sorted(places, key=lambda cell: places[cell])
    for number, method in enumerate(methods):
        shown = [(x, gains[method, cell].gain) for x, cell in enumerate(cells)
                 if (method, cell) in gains]  # fmt: skip
        aside = 0.1 * (number - (len(methods) - 1) / 2)  # or bars would hide one another
        axes.errorbar(
            [x + aside for x, _ in shown],
            [factor * gain.gain for _, gain in shown],
            yerr=[
                [factor * (gain.gain - gain.low) for _, gain in shown],
                [factor * (gain.high - gain.gain) for _, gain in shown],
            ],
            marker="o",
            markersize=4,
            linewidth=1.3,
            elinewidth=1,
            capsize=2,
            label=drawn_label(study, method, 30),
        )
    axes.axhline(0, color="#7f7f7f", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(cells)), [f"{places[cell]:g}" for cell in cells])
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.grid(axis="y", alpha=0.3)
