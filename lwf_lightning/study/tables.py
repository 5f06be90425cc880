"""The results of a study as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lwf_lightning.study.config import Study
from lwf_lightning.study.summary import Line

HEADINGS = (
    "method",
    "seeds",
    "mean",
    "gain, points [95 % interval]",
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
    """A line as text, in the order of ``HEADINGS``; the baseline has no gain."""
    gain = line.gain
    is_baseline = line.method == study.baseline
    return (
        study.label(line.method),
        str(gain.seeds),
        f"{100 * gain.mean:.1f}",
        "" if is_baseline else _interval(100 * gain.gain, 100 * gain.low, 100 * gain.high, "+.1f"),
        "" if is_baseline else _p_value(line.adjusted_p_value),
        ""
        if is_baseline or gain.recovered is None
        else _interval(gain.recovered, gain.recovered_low, gain.recovered_high, ".2f"),
        *("" if math.isnan(value) else f"{value:.2f}" for value in (line.seconds, line.memory)),
        ", ".join(
            f"{path.split('.')[-1]} {value:g}"
            if isinstance(value, float)
            else f"{path.split('.')[-1]} {value}"
            for path, value in line.setting.items()
        ),
    )


def tables(study: Study, lines: Sequence[Line]) -> list[Table]:
    """The tables of one cell: the comparison, then what else its runs tell.

    Args:
        study: The study.
        lines: The lines of the cell.
    """
    others = [_forgetting(study, lines)]
    if study.planted is not None:
        others.insert(0, _found(study, study.planted.value, lines))
    rows = [cells_of(study, line) for line in lines]
    return [Table("", HEADINGS, rows), *(table for table in others if table.rows)]


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
    return [f"{100 * value:.1f}" for value in accuracies[task]] if task in accuracies else ["", ""]


def markdown(study: Study, lines: Sequence[Line]) -> str:
    """All tables of a study, cell by cell."""
    parts = []
    for cell in study.cells:
        if own := [line for line in lines if line.cell == cell]:
            parts += [f"## {cell}", ""]
            for table in tables(study, own):
                parts += [f"### {table.title}", ""] if table.title else []
                parts += [*markdown_table(table.headings, table.rows), ""]
    return "\n".join(parts)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _p_value(value: float) -> str:
    if math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _interval(value: float, low: float, high: float, form: str) -> str:
    text = format(value, form)
    return text if math.isnan(low) else f"{text} [{format(low, form)}, {format(high, form)}]"
