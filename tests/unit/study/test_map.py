"""The map of gains: every cell at its place, in every panel that names it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.map import gain_map
from lwf_lightning.study.summary import summarize

MAP = {"texts": {"b": 100.0, "a": 10.0}, "share": {"a": 0.5, "c": 0.9}, "size": {"d": 3.0}}
GAINS = {"a": 0.02, "b": 0.10, "c": -0.04}


def make(tmp_path: Path, places: dict[str, dict[str, float]] = MAP) -> Study:
    methods = {name: Method() for name in ("vanilla", "lwf", "twin")}
    cells: dict[str, Any] = {name: {} for name in "abcd"}
    return Study("s", "none", methods, cells, [0, 1], map=places, output=str(tmp_path))


def test_every_panel_holds_the_gains_of_its_cells_in_order(tmp_path: Path) -> None:
    study = make(tmp_path)
    records = [
        {
            "run": f"{method}-{seed}-{cell}", "stage": "comparison", "cells": [cell],
            "method": method, "seed": seed, "setting": {},
            "curves": {}, "seconds": 1.0, "peak_memory": 1,
            "figures": {"test/accuracy": 0.5 + 0.1 * seed + gain * (0.95 + 0.1 * seed)},
        }
        for cell, gained in GAINS.items()
        for method, gain in (("vanilla", 0.0), ("lwf", gained), ("twin", 0.3))
        for seed in (0, 1)
        if (method, cell) != ("twin", "c")
    ]  # fmt: skip
    figure = gain_map(study, summarize(study, records))
    assert figure is not None
    texts, share, size, unused = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["texts", "share", "size", ""]
    assert [label.get_text() for label in texts.get_xticklabels()] == ["10", "100"]
    assert _means(texts) == {"lwf": [2.0, 10.0], "twin": [30.0, 30.0]}
    assert _means(share) == {"lwf": [2.0, -4.0], "twin": [30.0]}  # one has not run there
    assert _means(size) == {"lwf": [], "twin": []}
    assert not unused.axison
    bars = texts.containers[0][2][0].get_segments()
    low, high = bars[1][:, 1]
    # Two gains of 9.5 and 10.5 points: half an interval is t(0.975, 1) times half their distance.
    assert (low, high) == pytest.approx((10 - 12.706 * 0.5, 10 + 12.706 * 0.5), rel=1e-3)
    assert gain_map(study, []) is None
    assert gain_map(make(tmp_path, {}), summarize(study, records)) is None


def test_a_gain_that_is_the_same_with_every_seed_has_no_bar(tmp_path: Path) -> None:
    study = make(tmp_path)
    records = [
        {
            "run": f"{method}-{seed}", "stage": "comparison", "cells": ["a"], "method": method,
            "seed": seed, "setting": {}, "curves": {}, "seconds": 1.0, "peak_memory": 1,
            "figures": {"test/accuracy": figure},
        }
        for method, figure in (("vanilla", 0.6), ("lwf", 0.9))  # 0.9 - 0.6 is no 0.3
        for seed in (0, 1)
    ]  # fmt: skip
    lines = summarize(study, records)
    assert gain_map(study, lines) is not None
    assert math.isnan(lines[1].gain.low)
    assert lines[1].gain.gain == 0.3


def _means(axes: Any) -> dict[str, list[float]]:
    return {
        container.get_label(): [round(float(gain), 6) for gain in container[0].get_ydata()]
        for container in axes.containers
    }


def test_a_map_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"map: texts: 'e' is no key of cells: a, b, c, d"):
        make(tmp_path, {"texts": {"e": 0.0}})
    with pytest.raises(ValueError, match="map: texts: two cells have the same value"):
        make(tmp_path, {"texts": {"a": 0.0, "b": 0.0}})
