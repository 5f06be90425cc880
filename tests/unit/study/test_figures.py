"""Pictures of a study hold what they should, however many methods there are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.figures import confidences, gains, learning_curves
from lwf_lightning.study.summary import summarize


@pytest.fixture
def study(tmp_path: Path) -> Study:
    methods = {name: Method() for name in ("vanilla", "lwf", "twin", "npo", "lowest", "other")}
    return Study(
        "small", "none.yaml", methods, {"a": {}}, [0, 1], ceiling="twin", output=str(tmp_path)
    )


def record(study: Study, method: str, seed: int, **given: Any) -> dict[str, Any]:
    log = study.folder / "runs" / f"{method}-{seed}"
    curves = {"val/accuracy": [[0, 5], [0.2, 0.4 + 0.1 * seed]]}
    return {
        "stage": "comparison", "cells": ["a"], "method": method, "seed": seed,
        "run": log.name, "folder": str(log), "log": str(log), "curves": curves, **given,
    }  # fmt: skip


def test_a_gain_that_is_no_number_stands_last(study: Study) -> None:
    gained = {"vanilla": 0.0, "npo": 0.1, "other": math.nan, "lwf": 0.2}
    records = [
        record(study, method, seed, figures={"test/accuracy": gain}, setting={}, seconds=1.0,
               peak_memory=1)
        for method, gain in gained.items()
        for seed in (0, 1)
    ]  # fmt: skip
    without_ceiling = Study(**{**vars(study), "ceiling": None})
    figure = gains(without_ceiling, summarize(without_ceiling, records))
    assert figure is not None
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["other", "npo", "lwf"]  # from below


def write_scores(folder: str, confidence: dict[str, float], chosen: set[str]) -> None:
    file = Path(folder, "scores", "step-000000.jsonl")
    file.parent.mkdir(parents=True)
    rows = [
        {"prompt": prompt, "confidence": value, "selected": prompt in chosen}
        for prompt, value in confidence.items()
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_panel_of_curves_per_method_beside_baseline_and_ceiling(study: Study) -> None:
    records = [record(study, method, seed) for method in study.methods for seed in (0, 1)]
    figure = learning_curves(study, records)
    assert figure is not None
    drawn = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title() for axes in drawn] == ["lwf", "npo", "lowest", "other"]
    for axes in drawn:
        labels = [line.get_label() for line in axes.lines]
        assert labels == ["vanilla", "twin", "method of panel"]
        assert list(axes.lines[-1].get_ydata()) == pytest.approx([0.2, 0.45])


def test_curves_are_of_what_is_compared_without_tuning(study: Study) -> None:
    row = record(study, "lwf", 0)
    row["curves"]["val/loss"] = [[0, 4], [3.0, 1.5]]
    figure = learning_curves(replace(study, figure="test/loss"), [row])
    assert figure is not None
    assert list(figure.axes[0].lines[-1].get_ydata()) == pytest.approx([3.0, 1.5])


def test_a_baseline_alone_is_drawn_too(study: Study) -> None:
    figure = learning_curves(study, [record(study, "vanilla", 0)])
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["vanilla"]


def test_methods_that_score_alike_share_a_histogram(study: Study) -> None:
    records = [record(study, method, 0) for method in study.methods]
    scores = {f"p{n}": float(n - 5) ** 3 for n in range(12)}
    for row in records:
        if row["method"] in ("lwf", "npo"):
            write_scores(row["log"], scores, {"p11"})
        elif row["method"] == "lowest":
            write_scores(row["log"], scores, {"p0"})
        elif row["method"] == "other":
            write_scores(row["log"], {p: -value for p, value in scores.items()}, {"p0"})
    figure = confidences(study, records)
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes if axes.patches]
    assert titles == ["lwf and 2 more, seed 0", "other, seed 0"]
    assert confidences(study, [record(study, "vanilla", 0)]) is None
