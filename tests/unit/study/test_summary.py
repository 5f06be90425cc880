"""What the records of a study become in its tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.figures import costs
from lwf_lightning.study.statistics import adjusted_p_values, gain_over
from lwf_lightning.study.summary import summarize
from lwf_lightning.study.tables import HEADINGS, cells_of

FIGURES = {
    "vanilla": [0.50, 0.55, 0.48, 0.52],
    "one": [0.56, 0.58, 0.55, 0.60],
    "two": [0.53, 0.54, 0.52, 0.57],
    "twin": [0.91, 0.95, 0.90, 0.93],
}


def make(**options: Any) -> Study:
    methods = {name: Method() for name in FIGURES}
    return Study("small", "none.yaml", methods, {"a": {}}, [0, 1, 2, 3], ceiling="twin", **options)


def records() -> list[dict[str, Any]]:
    return [
        {
            "run": f"{method}-{seed}", "stage": "comparison", "cells": ["a"], "method": method,
            "seed": seed, "setting": {},
            "figures": {"test/accuracy": figure}, "curves": {}, "seconds": 1.0, "peak_memory": 1,
        }
        for method, figures in FIGURES.items()
        for seed, figure in enumerate(figures)
    ]  # fmt: skip


def test_p_is_adjusted_for_the_methods_and_the_ceiling_is_none_of_them() -> None:
    study = make()
    lines = {line.method: line for line in summarize(study, records())}
    baseline = dict(enumerate(FIGURES["vanilla"]))
    own = [gain_over(dict(enumerate(FIGURES[name])), baseline) for name in ("one", "two")]
    expected = adjusted_p_values([gain.p_value for gain in own if gain is not None])
    found = [lines[name].adjusted_p_value for name in ("one", "two")]
    assert found == pytest.approx(expected)
    assert math.isnan(lines["twin"].adjusted_p_value)
    shown = dict(zip(HEADINGS, cells_of(study, lines["twin"]), strict=True))
    assert shown["p, adjusted"] == ""
    assert shown["gain, points [95 % interval]"].startswith("+41.0 [")


def test_a_figure_that_was_not_measured_is_answered_with_those_that_were() -> None:
    message = "figure: vanilla-0 has no test/acuracy, only test/accuracy"
    with pytest.raises(ValueError, match=message):
        summarize(make(figure="test/acuracy"), records())


def test_time_and_memory_are_those_of_runs_that_were_not_interrupted() -> None:
    study = make()
    found = records()
    for record in found:
        if record["method"] == "one":
            record |= {"seconds": 3.0, "peak_memory": 2, "resumed": False}
        if record["method"] == "two" or (record["method"] == "vanilla" and record["seed"] > 0):
            record |= {"seconds": 0.1, "peak_memory": 0.1, "resumed": True}
    lines = {line.method: line for line in summarize(study, found)}
    assert (lines["one"].seconds, lines["one"].memory) == (3.0, 2.0)
    assert lines["vanilla"].seconds == 1.0
    assert math.isnan(lines["two"].seconds)
    shown = dict(zip(HEADINGS, cells_of(study, lines["two"]), strict=True))
    assert (shown["time"], shown["memory"]) == ("", "")
    figure = costs(study, list(lines.values()))
    assert figure is not None
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.15 * 3)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "3.00", "", "1.00"]
