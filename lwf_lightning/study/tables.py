"""The results of a study as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lwf_lightning.study.config import Study
from lwf_lightning.study.kept import Kept
from lwf_lightning.study.measure import Measure, measure_of
from lwf_lightning.study.pooled import Pooled
from lwf_lightning.study.statistics import Gain
from lwf_lightning.study.summary import Line

NO_SHARE = "-"
"""Stands where there may be no gap to have a share of."""
_WHY_NO_SHARE = (
    f"No share ({NO_SHARE}): the gap's own 95 % interval holds 0, or the ceiling is below the "
    "baseline, so that there may be nothing to win back."
)


def headings_of(study: Study) -> tuple[str, ...]:
    """The headings of the comparison; they tell the unit of a gain."""
    measure = measure_of(study.figure)
    return (
        "method",
        "seeds",
        _mean_heading(measure),
        f"gain, {measure.unit} [95 % interval]",
        "p, adjusted",
        "share of the gap won back [95 %]",
        "time",
        "memory",
        "chosen setting",
    )


@dataclass(frozen=True)
class Table:
    """Text in rows, with a title; the comparison itself has none."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def cells_of(study: Study, line: Line) -> tuple[str, ...]:
    """A line as text, in the order of :func:`headings_of`; the baseline has no gain."""
    gain, told = line.gain, measure_of(study.figure).told
    is_baseline = line.method == study.baseline
    return (
        study.label(line.method),
        _seeds(line),
        "" if math.isnan(gain.mean) else told(gain.mean),
        "" if is_baseline else _interval(*(told(v, "+") for v in (gain.gain, gain.low, gain.high))),
        "" if is_baseline else _p_value(line.adjusted_p_value),
        "" if is_baseline else _share(gain),
        *("" if math.isnan(value) else f"{value:.2f}" for value in (line.seconds, line.memory)),
        (f"{study.label(line.way)}: " if line.way else "")
        + ", ".join(
            f"{path.split('.')[-1]} {value:g}"
            if isinstance(value, float)
            else f"{path.split('.')[-1]} {value}"
            for path, value in line.setting.items()
        ),
    )


def _seeds(line: Line) -> str:
    seeds, lost = line.gain.seeds, line.diverged
    return f"{seeds - lost} of {seeds} seeds, {lost} diverged" if lost else str(seeds)


def tables(study: Study, lines: Sequence[Line]) -> list[Table]:
    """The tables of one cell: the comparison, then what else its runs tell.

    Args:
        study: The study.
        lines: The lines of the cell.
    """
    by_itself = [line for line in lines if line.way is None]
    others = [_forgetting(study, by_itself)]
    if study.planted is not None:
        others.insert(0, _found(study, study.planted.value, by_itself))
    rows = [cells_of(study, line) for line in lines]
    return [Table("", headings_of(study), rows), *(table for table in others if table.rows)]


def _found(study: Study, sought: str, lines: Sequence[Line]) -> Table:
    rows = [
        (
            study.label(line.method),
            *(f"{line.found[n]:.3f}" if n in line.found else "" for n in ("area", "precision")),
        )
        for line in lines
        if line.found
    ]
    headings = ("method", "area under the ROC curve of confidence", "precision of the chosen texts")
    return Table(f"what was found of the {sought} texts, mean over seeds", headings, rows)


def _forgetting(study: Study, lines: Sequence[Line]) -> Table:
    rows = [
        (
            study.label(line.method),
            task,
            *_percent(line.forgetting, task),
            *_percent(line.seen, task),
        )
        for line in lines
        for task in sorted({*line.forgetting, *line.seen})
    ]
    headings = ["method", "forgetting task", "before, %", "after, %"]
    if any(line.seen for line in lines):
        headings += ["elicited prompts: before, %", "after, %"]
    title = "accuracy on forgetting tasks, on prompts that were not elicited"
    return Table(title, headings, [row[: len(headings)] for row in rows])


def _percent(accuracies: Mapping[str, tuple[float, float]], task: str) -> list[str]:
    pair = accuracies.get(task, (math.nan, math.nan))
    return ["" if math.isnan(value) else f"{100 * value:.1f}" for value in pair]


def pooled_table(study: Study, pooled: Sequence[Pooled]) -> Table:
    """The methods over all cells together."""
    measure = measure_of(study.figure)
    shared = any(line.groups < line.cells for line in pooled)
    rows = [
        (
            study.label(line.method),
            f"{line.cells} in {line.groups}" if shared else f"{line.cells}",
            str(line.gain.seeds),
            "" if math.isnan(line.gain.mean) else measure.told(line.gain.mean),
            _interval(
                *(measure.told(v, "+") for v in (line.gain.gain, line.gain.low, line.gain.high))
            ),
            _ends(measure.told(line.low, "+"), measure.told(line.high, "+")),
            "" if math.isnan(line.gain.gain) else f"{line.above} of {line.gain.seeds}",
        )
        for line in pooled
    ]
    headings = (
        "method",
        "cells" + (" in groups that share runs" if shared else ""),
        "pairs",
        _mean_heading(measure),
        f"gain, {measure.unit} [95 %, other seeds]",
        "[95 %, other cells]",
        "better in",
    )
    return Table(f"all cells, against {study.label(study.baseline)}", headings, rows)


def kept_table(study: Study, kept: Sequence[Kept]) -> Table:
    """The run that validation keeps, a column per number of runs."""
    measure = measure_of(study.figure)
    budgets = sorted({line.runs for line in kept})
    cells = {line.method: line.cells for line in kept}
    rows = []
    for method, own in cells.items():
        told = {line.runs: _kept(measure, line) for line in kept if line.method == method}
        most = cells.get(study.baseline, own)
        where = f", in {own} of {most} cells" if own < most else ""
        rows.append((study.label(method) + where, *(told.get(runs, "") for runs in budgets)))
    runs = ("1 run", *(f"best of {runs}" for runs in budgets[1:]))
    title = f"the run that validation keeps of as many, against {study.label(study.baseline)}"
    return Table(title, ("method", *runs), rows)


def _kept(measure: Measure, line: Kept) -> str:
    if math.isnan(line.figure):
        return ""
    gain = _interval(*(measure.told(v, "+") for v in (line.gain, line.low, line.high)))
    return measure.told(line.figure) + (f", {gain}" if gain else "")


def markdown(
    study: Study,
    lines: Sequence[Line],
    pooled: Sequence[Pooled] = (),
    kept: Sequence[Kept] = (),
    notes: Sequence[str] = (),
) -> str:
    """What is compared with what, all cells together where there are several, then each cell.

    The runs that validation keeps stand behind all cells together, or behind the only one.

    Args:
        study: The study.
        lines: A line per cell and method.
        pooled: Those of all cells together.
        kept: Those of the runs that validation keeps.
        notes: What else its head says, a paragraph each.
    """
    less = "" if measure_of(study.figure).sign > 0 else ", of which less is better"
    compared = f"{study.figure}{less}; gains are against {study.label(study.baseline)}."
    parts = [f"# Study: {study.name}", "", compared, ""]
    parts += [line for note in notes for line in (note, "")]
    if pooled:
        table = pooled_table(study, pooled)
        parts += [f"## {table.title}", "", *markdown_table(table.headings, table.rows), ""]
    of_runs: list[str] = []
    if kept:
        table = kept_table(study, kept)
        of_runs = [f"## {table.title}", "", *markdown_table(table.headings, table.rows), ""]
    if pooled:
        parts += of_runs
    for cell in study.cells:
        if own := [line for line in lines if line.cell == cell]:
            parts += [f"## {cell}", ""]
            for table in tables(study, own):
                parts += [f"### {table.title}", ""] if table.title else []
                parts += [*markdown_table(table.headings, table.rows), ""]
                if any(NO_SHARE in row for row in table.rows):
                    parts += [_WHY_NO_SHARE, ""]
    if not pooled:
        parts += of_runs
    return "\n".join(parts)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    heading, *others = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (headings, *rows)
    )
    return [heading, "|" + "---|" * len(headings), *others]


def _mean_heading(measure: Measure) -> str:
    return "mean" if measure.sign > 0 else f"mean, {measure.unit}, lower is better"


def _share(gain: Gain) -> str:
    if gain.recovered is None or math.isnan(gain.gain):
        return ""
    if math.isnan(gain.recovered):
        return NO_SHARE
    return _interval(
        *(f"{v:.2f}" for v in (gain.recovered, gain.recovered_low, gain.recovered_high))
    )


def _p_value(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _interval(value: str, low: str, high: str) -> str:
    return "" if "nan" in value else f"{value} {_ends(low, high)}".strip()


def _ends(low: str, high: str) -> str:
    return "" if "nan" in low else f"[{low}, {high}]"
