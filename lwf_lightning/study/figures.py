"""The results of a study as pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from lwf_lightning.files import whole_file
from lwf_lightning.forgetting.planted import last_scores
from lwf_lightning.study.config import Study
from lwf_lightning.study.drawn import drawn_label, literal
from lwf_lightning.study.kept import Kept, kept_curves
from lwf_lightning.study.map import gain_map
from lwf_lightning.study.matrix import Record
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.planted import log_folder
from lwf_lightning.study.pooled import Pooled
from lwf_lightning.study.summary import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, RED, BLUE = "#7f7f7f", "#d62728", "#1f77b4"
_WIDTH = 40
"""Characters of a line that leave half of a figure's width."""


@dataclass(frozen=True)
class Pictures:
    """PNG files in a study's folder.

    Attributes:
        map: Where methods gain; None if the study has none.
        pooled: Gains over all cells together; None with one cell.
        kept: What validation keeps of a number of runs; None without tuning.
        cells: Cell -> title -> file.
    """

    map: Path | None
    pooled: Path | None
    kept: Path | None
    cells: dict[str, dict[str, Path]]


def draw_all(
    study: Study,
    lines: Sequence[Line],
    pooled: Sequence[Pooled],
    kept: Sequence[Kept],
    records: Sequence[Record],
) -> Pictures:
    """Draws what there is to draw: a map, all cells together, and a set of pictures per cell."""
    folder = study.folder / "figures"
    places, overall, curves = (
        gain_map(study, lines),
        gains(study, pooled),
        kept_curves(study, kept),
    )
    pictures = Pictures(
        map=_save(places, folder / "map.png") if places else None,
        pooled=_save(overall, folder / "pooled.png") if overall else None,
        kept=_save(curves, folder / "kept.png") if curves else None,
        cells={},
    )
    for cell in study.cells:
        own = [line for line in lines if line.cell == cell]
        if not own:
            continue
        runs = [r for r in records if cell in r["cells"] and r["stage"] == "comparison"]
        runs = [record for record in runs if "diverged" not in record]
        ways = {line.method: line.way or line.method for line in own}
        drawn = {
            "gain": gains(study, own),
            "curves": learning_curves(study, runs, ways.get(study.baseline)),
            "confidence": confidences(study, runs),
            "cost": costs(study, own),
        }
        pictures.cells[cell] = {
            TITLES[kind]: _save(figure, folder / f"{cell}-{kind}.png")
            for kind, figure in drawn.items()
            if figure is not None
        }
    return pictures


TITLES = {
    "gain": "gain over the baseline",
    "curves": "learning curves",
    "confidence": "forgetting confidence",
    "cost": "time and memory",
}


def gains(study: Study, lines: Sequence[Line] | Sequence[Pooled]) -> Figure | None:
    """A dot and a 95 % interval per method, best first; over all cells the one over cells, too."""
    shown = sorted(
        (line for line in lines if line.method != study.baseline),
        key=lambda line: -math.inf if math.isnan(line.gain.gain) else line.gain.gain,
    )
    if not shown:
        return None
    names = [drawn_label(study, line.method, _WIDTH) for line in shown]
    figure = _rows(names)
    axes = figure.subplots()
    measure = measure_of(study.figure)
    factor = measure.factor
    for place, line in enumerate(shown):
        gain = line.gain
        colour = BLUE if line.method == study.ceiling else RED
        if isinstance(line, Pooled) and not math.isnan(line.low):
            ends = [factor * line.low, factor * line.high]  # ticks: it may lie within the other
            axes.plot(ends, [place, place], color=colour, lw=0.8, marker="|", ms=10)
        if not math.isnan(gain.low):
            axes.plot([factor * gain.low, factor * gain.high], [place, place], color=colour, lw=2)
        inside = "white" if math.isnan(gain.low) else colour  # or it would look like a sure gain
        axes.plot(factor * gain.gain, place, "o", color=colour, mfc=inside)
    axes.axvline(0, color=GREY, lw=1, ls="--")
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    seeds = sorted({line.gain.seeds for line in shown})
    told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    what = (
        f"mean of {told} pairs of cell and seed; thick: 95 % interval with other seeds, "
        "thin, between ticks: with other cells"
        if isinstance(shown[0], Pooled)
        else f"mean and 95 % interval, {told} seeds"
    )
    if any(math.isnan(line.gain.low) and not math.isnan(line.gain.gain) for line in shown):
        what += "; hollow: no interval, with one seed or all alike"
    compared = f"{study.figure} {measure.above} {study.label(study.baseline)}, {measure.unit}"
    label = f"{compared} ({what})"
    axes.set_xlabel(literal(textwrap.fill(label, 60)))
    axes.grid(axis="x", alpha=0.3)
    return figure


def learning_curves(
    study: Study, records: Sequence[Record], baseline: str | None = None
) -> Figure | None:
    """A panel per method: its validation curve beside the baseline's and the ceiling's.

    Lines are means over seeds; the band reaches from the lowest seed to the highest.

    Args:
        study: The study.
        records: The runs of a cell.
        baseline: The method whose runs the baseline has there; None if it is the baseline.
    """
    baseline = baseline or study.baseline
    figure_name = study.validation_figure
    curves: dict[str, dict[int, list[float]]] = {}
    for record in records:
        steps, values = record["curves"].get(figure_name, ([], []))
        for step, value in zip(steps, values, strict=True):
            curves.setdefault(record["method"], {}).setdefault(step, []).append(value)
    if not curves:
        return None
    marks = {baseline: drawn_label(study, study.baseline, _WIDTH)}
    if study.ceiling is not None:
        marks[study.ceiling] = drawn_label(study, study.ceiling, _WIDTH)
    shown = [m for m in study.methods if m in curves and m not in marks] or list(curves)
    figure, panels = _panels(len(shown), shared=True)
    for axes, method in zip(panels, shown, strict=True):
        for beside, label in marks.items():
            if beside in curves:
                colour = "black" if beside == baseline else BLUE
                axes.plot(*_mean(curves[beside]), color=colour, lw=1.2, label=label)
        steps = sorted(curves[method])
        low, high = ([end(curves[method][step]) for step in steps] for end in (min, max))
        axes.fill_between(steps, low, high, color=RED, alpha=0.2, lw=0)
        axes.plot(*_mean(curves[method]), "o-", ms=2.5, lw=1.5, color=RED, label="method of panel")
        axes.set_title(drawn_label(study, method, 32), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.supxlabel("learning step", fontsize=9)
    less = "" if measure_of(figure_name).sign > 0 else " (lower is better)"
    figure.supylabel(f"{figure_name}{less}, mean and range over seeds", fontsize=9)
    return figure


def confidences(study: Study, records: Sequence[Record]) -> Figure | None:
    """Histograms of forgetting confidence with the chosen part marked, from first runs.

    Methods that score alike share a panel, which marks what the first of them chose.
    """
    alike: dict[tuple[Any, ...], list[Record]] = {}
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for record in _first_of_each(study, records):
        if rows := last_scores(log_folder(study, record)):
            scores = sorted((row["prompt"], float(f"{row['confidence']:.4g}")) for row in rows)
            alike.setdefault(tuple(scores), []).append(record)
            rows_of[record["method"]] = rows
    if not alike:
        return None
    figure, panels = _panels(len(alike))
    for axes, (record, *others) in zip(panels, alike.values(), strict=True):
        rows = rows_of[record["method"]]
        kept, chosen = (
            [row["confidence"] for row in rows if row["selected"] == selected]
            for selected in (False, True)
        )
        edges, scale = _wide_range([*kept, *chosen])
        axes.set_xscale("symlog", linthresh=scale)  # a few texts lie far above all others
        axes.hist(
            [kept, chosen],
            bins=edges,
            stacked=True,
            color=["#bbbbbb", RED],
            label=["kept", "chosen to be forgotten"],
        )
        axes.set_xticks(_decades([*kept, *chosen], scale))
        more = f" and {len(others)} more" if others else ""
        title = f"{study.label(record['method'])}{more}, seed {record['seed']}"
        axes.set_title(literal(textwrap.fill(title, 32)), fontsize=8)
        axes.tick_params(labelsize=7)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel("forgetting confidence, constant left out", fontsize=9)
    figure.supylabel("texts", fontsize=9)
    return figure


def costs(study: Study, lines: Sequence[Line]) -> Figure | None:
    """Time and memory as multiples of the baseline's, of each method once."""
    lines = [line for line in lines if line.way is None]
    names = [drawn_label(study, line.method, _WIDTH) for line in lines]
    figure = _rows(names)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, title in (
        (left, [line.seconds for line in lines], "time of a run"),
        (right, [line.memory for line in lines], "peak memory of a run"),
    ):
        bars = axes.barh(names, values, color=GREY)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axvline(1, color="black", lw=1, ls="--")
        told = f"{title}, multiple of {study.label(study.baseline)}"
        axes.set_xlabel(literal(textwrap.fill(told, _WIDTH)), fontsize=8)
        axes.set_xlim(0, 1.15 * max((v for v in values if not math.isnan(v)), default=1.0))
    left.invert_yaxis()
    return figure


def _wide_range(values: Sequence[float]) -> tuple[list[float], float]:
    """Edges of 30 bins, even on an axis that is linear up to five medians and logarithmic on."""
    scale = 5 * median(abs(value) for value in values) or 1.0
    low, high = math.asinh(min(values) / scale), math.asinh(max(values) / scale)
    inner = [scale * math.sinh(low + (high - low) * n / 30) for n in range(1, 30)]
    # As they are, since rounding would leave the outermost out; of values alike none lies inside.
    return sorted([min(values), *inner, max(values)]), scale


def _decades(values: Sequence[float], scale: float) -> list[float]:
    """Ticks that do not touch: zero, and the outermost power of ten on either side."""
    ends = [(-1.0, -min(values)), (1.0, max(values))]
    outer = [sign * 10.0 ** math.floor(math.log10(end)) for sign, end in ends if end > scale]
    return [0.0, *outer]


def _first_of_each(study: Study, records: Iterable[Record]) -> list[Record]:
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        first.setdefault(record["method"], record)
    return [first[method] for method in study.methods if method in first]


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def _mean(curve: Mapping[int, Sequence[float]]) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [fmean(curve[step]) for step in steps]


def _rows(names: Sequence[str]) -> Figure:
    """A figure as high as the names beside it need."""
    lines = max((name.count("\n") for name in names), default=0)
    return _figure(8, 0.9 + (0.32 + 0.17 * lines) * len(names))


def _panels(count: int, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of that many panels, at most four a row; ``shared`` axes have one range."""
    columns = min(4, count)
    lines = math.ceil(count / columns)
    figure = _figure(max(2.7 * columns, 5), 2.1 * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=shared, sharey=shared)
    every = list(grid.flatten())
    for axes in every[count:]:
        axes.set_axis_off()
    for axes in every[max(count - columns, 0) : count]:
        axes.tick_params(labelbottom=True)  # the lowest of its column, not always of the figure
    return figure, every[:count]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
