"""Pictures of a study hold what they should, however many methods there are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.figures import (
    _wide_range,
    confidences,
    costs,
    gains,
    learning_curves,
)
from lwf_lightning.study.map import gain_map
from lwf_lightning.study.summary import Line, summarize


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


def drawn_with_long_labels(study: Study, seeds: int = 2) -> tuple[Study, list[Line]]:
    """Six methods of long names: gains of 0, 10, ... points, the same with every seed."""
    label = (
        "before every step, nothing rehearsed, beside a pull to the base weights that is strong: "
    )
    methods = {name: Method(label=label + name) for name in study.methods}
    study = replace(study, methods=methods, map={"size": {"a": 1.0}})
    records = [
        record(study, method, seed, figures={"test/accuracy": 0.1 * place + 0.01 * seed},
               setting={}, seconds=1.0, peak_memory=1)
        for place, method in enumerate(study.methods)
        for seed in range(seeds)
    ]  # fmt: skip
    return study, summarize(study, records)


def assert_inside(figure: Figure | None) -> None:
    """Everything that is drawn lies in the figure, and each axes has more than half its width."""
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.bbox.size
    box = figure.get_tightbbox(renderer)
    dots = figure.dpi
    assert box.x0 * dots >= 0
    assert box.y0 * dots >= 0
    assert box.x1 * dots <= width
    assert box.y1 * dots <= height
    assert sum(axes.bbox.width for axes in figure.axes) > 0.5 * width
    assert all(axes.bbox.height > 100 for axes in figure.axes)


@pytest.mark.parametrize("drawing", [gains, costs, gain_map])
def test_long_labels_neither_leave_the_figure_nor_crush_it(study: Study, drawing: Any) -> None:
    assert_inside(drawing(*drawn_with_long_labels(study)))


def test_a_gain_without_an_interval_is_hollow(study: Study) -> None:
    for seeds, noise in ((1, 0.0), (2, 0.0), (2, 0.01)):
        known, lines = drawn_with_long_labels(study, seeds)
        for line in lines:
            if noise:
                ends = {"low": line.gain.gain - noise, "high": line.gain.gain + noise}
                object.__setattr__(line, "gain", replace(line.gain, **ends))
        figure = gains(known, lines)
        assert figure is not None
        dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert [dot.get_markerfacecolor() == "white" for dot in dots] == [not noise] * 5
        assert ("hollow: no interval" in figure.axes[0].get_xlabel().replace("\n", " ")) == (
            not noise
        )


def test_labels_are_drawn_as_they_stand(study: Study) -> None:
    """Dollars are no formula, which need not even be one, and an underscore hides nothing."""
    methods = {name: Method() for name in study.methods}
    methods["lwf"] = Method(label="_p($a_$) and\n more\n")
    study = replace(study, methods=methods, map={"size": {"a": 1.0}})
    records = [
        record(study, method, seed, figures={"test/accuracy": 0.1 * seed}, setting={},
               seconds=1.0, peak_memory=1)
        for method in study.methods
        for seed in (0, 1)
    ]  # fmt: skip
    lines = summarize(study, records)
    for figure in (gains(study, lines), costs(study, lines), gain_map(study, lines),
                   learning_curves(study, records)):  # fmt: skip
        assert_inside(figure)
    figure = gain_map(study, lines)
    assert figure is not None
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[0].lstrip("\u200b") == r"_p(\$a_\$) and more"
    assert study.label("lwf") == "_p($a_$) and more"


def test_no_text_is_left_out_of_a_histogram(study: Study) -> None:
    source = np.random.default_rng(0)
    for draw in range(30):
        scores = {f"p{n}": float(v) for n, v in enumerate(source.lognormal(sigma=2, size=40))}
        row = record(study, "lwf", draw)
        write_scores(row["log"], scores, {"p0"})
        figure = confidences(study, [row])
        assert figure is not None
        assert sum(bar.get_height() for bar in figure.axes[0].patches) == 40


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


@pytest.mark.parametrize("apart", [0.0, 1e-16])
def test_a_histogram_of_values_alike_can_be_drawn(apart: float, study: Study) -> None:
    for draw, value in enumerate(np.random.default_rng(0).lognormal(sigma=3, size=200)):
        edges, _ = _wide_range([float(value), float(value * (1 + apart))])
        assert edges == sorted(edges), draw
