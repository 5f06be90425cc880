"""The results of a study as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        f"{line.seconds:.2f}",
        f"{line.memory:.2f}",
        ", ".join(
            f"{path.split('.')[-1]} {value:g}"
            if isinstance(value, float)
            else f"{path.split('.')[-1]} {value}"
            for path, value in line.setting.items()
        ),
    )


def forgetting_cells(line: Line) -> list[tuple[str, str, str]]:
    """Task, accuracy before and after training of a line's forgetting tasks, as text."""
    return [
        (task, f"{100 * before:.1f}", f"{100 * after:.1f}")
        for task, (before, after) in line.forgetting.items()
    ]


def markdown(study: Study, lines: Sequence[Line]) -> str:
    """All tables of a study: one per cell."""
    parts = []
    for cell in study.cells:
        own = [line for line in lines if line.cell == cell]
        if not own:
            continue
        parts += [
            f"## {cell}",
            "",
            *markdown_table(HEADINGS, [cells_of(study, line) for line in own]),
            "",
        ]
        rows = [
            (study.label(line.method), *cells) for line in own for cells in forgetting_cells(line)
        ]
        if rows:
            heads = ("method", "forgetting task", "accuracy before", "after (unseen prompts)")
            parts += [*markdown_table(heads, rows), ""]
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
