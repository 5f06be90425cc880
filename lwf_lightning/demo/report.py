"""What the demo shows: figures of its runs, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lwf_lightning.files import whole_file
from lwf_lightning.forgetting.planted import PartScores
from lwf_lightning.forgetting.report import write_jsonl

PARTS = ("outdated", "helpful", "neutral")
COLOURS = {"vanilla": "#7f7f7f", "LWF": "#d62728", "clean twin": "#1f77b4"}
PART_COLOURS = {"outdated": "#d62728", "helpful": "#1f77b4", "neutral": "#bbbbbb"}


@dataclass(frozen=True)
class DemoRun:
    """A finished run: its name, its folder, and its figures on the test split."""

    name: str
    folder: Path
    test: dict[str, float]

    def curve(self, figure: str) -> tuple[list[int], list[float]]:
        """Learning steps and values of a logged figure."""
        with (self.folder / "metrics.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get(figure)]
        return [int(row["step"]) for row in rows], [float(row[figure]) for row in rows]


def save_rows(runs: Sequence[DemoRun], path: Path) -> None:
    """Writes one line per run: name, folder and test figures."""
    write_jsonl(path, ({"run": run.name, "folder": str(run.folder), **run.test} for run in runs))


def verdict(vanilla: float, lwf: float, twin: float) -> str:
    """What LWF wins back of what plain fine-tuning lacks to the clean twin, in words.

    Args:
        vanilla: Accuracy of plain fine-tuning, in [0, 1].
        lwf: That of LWF.
        twin: That of the clean twin.
    """
    lacking, won = 100 * (twin - vanilla), 100 * (lwf - vanilla)
    if lacking <= 0:
        return (
            f"No negative transfer: the clean twin is {abs(lacking):.1f} points below plain "
            f"fine-tuning, and LWF {abs(won):.1f} points {'below' if won < 0 else 'above'} plain "
            "fine-tuning"
        )
    told = f"Negative transfer: {lacking:.1f} points; LWF wins back "
    if won < 0:
        return f"{told}none of them: it is {-won:.1f} points below plain fine-tuning"
    return f"{told}{won:.1f} of them"


def draw(runs: Sequence[DemoRun], scores: PartScores, path: Path) -> None:
    """Draws accuracies, learning curves and confidences side by side, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    bars, curves, histogram = figure.subplots(1, 3)

    names = [run.name for run in runs]
    values = [100 * run.test["test/accuracy"] for run in runs]
    drawn = bars.bar(names, values, color=[COLOURS[name] for name in names])
    bars.bar_label(drawn, fmt="%.1f")
    bars.set(ylabel="test accuracy, %", ylim=(0, 110), title="Learning task after fine-tuning")

    for run in runs:
        steps, accuracy = run.curve("val/accuracy")
        curves.plot(
            steps, [100 * v for v in accuracy], "o-", ms=3, color=COLOURS[run.name], label=run.name
        )
    curves.set(xlabel="learning step", ylabel="validation accuracy, %", ylim=(0, 100))
    curves.set_title("On the way")
    curves.legend(frameon=False)

    texts = len(scores.parts)
    histogram.hist(
        [[100 * n / texts for n, own in enumerate(scores.parts) if own == part] for part in PARTS],
        bins=range(0, 101, 5),
        stacked=True,
        color=[PART_COLOURS[part] for part in PARTS],
        label=PARTS,
    )
    edge = 100 * sum(scores.selected) / texts
    histogram.axvline(edge, color="black", lw=1, ls="--", label="selected up to here")
    histogram.set(xlabel="texts of D_self, highest confidence first, %", ylabel="texts")
    histogram.set_title(f"What LWF chose to forget (area under ROC {scores.area:.2f})")
    histogram.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
