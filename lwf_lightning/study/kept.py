"""What as many runs give as one can afford, where the one that validates best is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lwf_lightning.study.config import Study
from lwf_lightning.study.drawn import drawn_label
from lwf_lightning.study.matrix import Record, settings_of, validated
from lwf_lightning.study.measure import Measure, measure_of
from lwf_lightning.study.pooled import groups_that_share
from lwf_lightning.study.statistics import t_interval
from lwf_lightning.study.summary import compared_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 8
"""Methods in the picture, beside the baseline."""

Trials: TypeAlias = dict[str, list[Record]]
"""Cell -> all trials of a method, or of all ways of a ``best_of``."""


@dataclass(frozen=True)
class Kept:
    """A method of which a number of runs is made and one is kept.

    Attributes:
        method: Key of the method, or of the study's ``best_of``.
        runs: How many of its trials are drawn, each a setting of its space with a seed of its own.
        cells: In how many cells the method and the baseline have all of theirs.
        figure: The compared figure of the run that validates best among them: expected over the
            draws, mean over cells.
        gain: How much better it is than what as many runs of the baseline give; NaN for the
            baseline itself, and where it has no such number of trials.
        low: Lower end of the gain's 95 % interval with the cells as the sample (Student's t), those
            that share runs as one: what other cells may give. NaN with one cell.
        high: Upper end.
    """

    method: str
    runs: int
    cells: int
    figure: float
    gain: float
    low: float
    high: float


def kept_figure(validations: Sequence[float], figures: Sequence[float], runs: int) -> float:
    """Expected figure of the run that validates best of some, drawn without replacement.

    Dodge et al., "Show Your Work" (arXiv 1909.03004), who expect the validation figure itself;
    without replacement it is not biased (Tang et al., arXiv 2004.13705). Runs that validate alike
    are as likely to be kept.

    Args:
        validations: What each run is chosen by, higher is better; NaN and -inf are the worst.
        figures: Its figure.
        runs: How many are drawn, from 1 to all.

    Raises:
        ValueError: If so many cannot be drawn.

    Example:
        >>> round(kept_figure([0.2, 0.9, 0.9], [0.1, 0.6, 0.8], runs=2), 4)  # a 0.9 is in each two
        0.7
    """
    if not 1 <= runs <= len(validations):
        raise ValueError(f"runs must be from 1 to {len(validations)}, got {runs}")
    chosen_by = [-math.inf if math.isnan(value) else value for value in validations]
    draws = math.comb(len(chosen_by), runs)
    expected, below = 0.0, 0
    for value in sorted(set(chosen_by)):
        alike = [f for v, f in zip(chosen_by, figures, strict=True) if v == value]
        up_to = below + len(alike)
        if best := math.comb(up_to, runs) - math.comb(below, runs):  # draws of which it is the best
            expected += best / draws * fmean(alike)
        below = up_to
    return expected


def kept(study: Study, records: Iterable[Record]) -> list[Kept]:
    """Lines by method and ``best_of``, then by number of runs: powers of two, and all.

    Only trials are drawn from, of the cells where the method and the baseline have all of theirs:
    runs of the comparison have settings that were chosen. None without tuning.

    Args:
        study: The study.
        records: The records that it asks for.
    """
    if study.tuning is None:
        return []
    trials = _trials(study, [record for record in records if record["stage"] == "tuning"])
    beside = trials.get(study.baseline, {})
    lines = []
    for method, own in trials.items():
        shared = {cell: own[cell] for cell in own if cell in beside}
        most = min((len(runs) for runs in shared.values()), default=0)
        budgets = {2**power for power in range(most.bit_length()) if 2**power <= most}
        lines += [
            _kept(study, method, runs, shared, beside) for runs in sorted({*budgets, most} - {0})
        ]
    return lines


def kept_curves(study: Study, lines: Sequence[Kept]) -> Figure | None:
    """The figure of the kept run against the number of runs: the baseline, and the eight best.

    Only what has all cells of the baseline: over others a mean is no higher or lower than its own.
    """
    measure = measure_of(study.figure)
    curves: dict[str, list[Kept]] = {}
    for line in lines:
        curves.setdefault(line.method, []).append(line)
    if study.baseline not in curves or not any(len(curve) > 1 for curve in curves.values()):
        return None
    cells = curves[study.baseline][0].cells
    others = [m for m in curves if m != study.baseline and curves[m][0].cells == cells]
    others.sort(key=lambda method: _worth(measure, curves[method][-1]), reverse=True)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in (study.baseline, *others[:_SHOWN]):
        runs = [line.runs for line in curves[method]]
        figures = [measure.factor * line.figure for line in curves[method]]
        style, colour = ("o--", "black") if method == study.baseline else ("o-", None)
        label = drawn_label(study, method, 40)
        axes.plot(runs, figures, style, color=colour, ms=4, lw=1.5, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({line.runs for line in lines})
    axes.set_xticks(ticks, [str(runs) for runs in ticks])
    axes.minorticks_off()
    axes.set_xlabel("runs, of which the one that validates best is kept")
    axes.set_ylabel(f"{study.figure} of that run, {measure.unit if measure.sign < 0 else '%'}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _worth(measure: Measure, line: Kept) -> float:
    return -math.inf if math.isnan(line.figure) else measure.sign * line.figure


def _trials(study: Study, records: Sequence[Record]) -> dict[str, Trials]:
    seeds = study.tuning.seeds if study.tuning else []
    found: dict[str, Trials] = {}
    for method in study.methods:
        whole = len(settings_of(study, method)) * len(seeds)
        mine = [record for record in records if record["method"] == method]
        by_cell = {cell: [r for r in mine if cell in r["cells"]] for cell in study.cells}
        found[method] = {cell: own for cell, own in by_cell.items() if len(own) == whole}
    for name, ways in study.best_of.items():
        cells = [cell for cell in study.cells if all(cell in found[way] for way in ways)]
        found[name] = {cell: [r for way in ways for r in found[way][cell]] for cell in cells}
    return found


def _kept(study: Study, method: str, runs: int, own: Trials, beside: Trials) -> Kept:
    sign = measure_of(study.figure).sign
    # Cells that have all their runs in common are one.
    different = {(_names(own[cell]), _names(beside[cell])): cell for cell in own}
    cells = list(different.values())
    groups = groups_that_share([frozenset().union(*names) for names in different])
    figures = {cell: sign * _figure(study, own[cell], runs) for cell in cells}
    gains = np.array([math.nan])
    if method != study.baseline and all(len(beside[cell]) >= runs for cell in cells):
        gain = {cell: figures[cell] - sign * _figure(study, beside[cell], runs) for cell in cells}
        gains = np.array([fmean(gain[cells[n]] for n in group) for group in groups])
    low, high, _ = t_interval(gains)
    return Kept(
        method=method,
        runs=runs,
        cells=len(own),
        figure=sign * fmean(fmean(figures[cells[n]] for n in group) for group in groups),
        gain=float(gains.mean()),
        low=low,
        high=high,
    )


def _figure(study: Study, trials: Sequence[Record], runs: int) -> float:
    chosen_by = [validated(trial, study.validation_figure) for trial in trials]
    return kept_figure(chosen_by, [compared_figure(study, trial) for trial in trials], runs)


def _names(trials: Iterable[Record]) -> frozenset[str]:
    return frozenset(trial["run"] for trial in trials)
