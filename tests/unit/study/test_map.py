"""The map of gains: every cell at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lwf_lightning.study.config import Map, Method, Study
from lwf_lightning.study.map import gain_map
from lwf_lightning.study.summary import summarize

PLACES = {"a": (10.0, 0.5), "b": (100.0, 0.5), "c": (10.0, 0.9)}
GAINS = {"a": 0.02, "b": 0.10, "c": -0.04}


def make(tmp_path: Path, **given: Any) -> Study:
    plan = {"x": "texts", "y": "share", "method": "lwf", "coordinates": PLACES} | given
    methods = {name: Method() for name in ("vanilla", "lwf", "twin")}
    cells: dict[str, Any] = {"a": {}, "b": {}, "c": {}}
    return Study(
        "s", "none", methods, cells, [0, 1], ceiling="twin", map=Map(**plan), output=str(tmp_path)
    )


def test_every_square_holds_the_gain_of_its_cell(tmp_path: Path) -> None:
    study = make(tmp_path)
    records = [
        {
            "stage": "comparison", "cells": [cell], "method": method, "seed": seed, "setting": {},
            "curves": {}, "seconds": 1.0, "peak_memory": 1,
            "figures": {"test/accuracy": 0.5 + 0.1 * seed + gain * (0.95 + 0.1 * seed)},
        }
        for cell in study.cells
        for method, gain in (("vanilla", 0.0), ("lwf", GAINS[cell]), ("twin", 0.3))
        for seed in (0, 1)
    ]  # fmt: skip
    figure = gain_map(study, summarize(study, records))
    assert figure is not None
    left, right, _ = figure.axes
    shown = {text.get_position(): text.get_text().split("\n")[0] for text in left.texts}
    assert shown == {(0, 0): "+2.0", (1, 0): "+10.0", (0, 1): "-4.0"}
    assert left.images[0].get_array().mask.tolist() == [[False, False], [False, True]]
    assert left.images[0].get_array()[0, 1] == pytest.approx(10)
    assert [text.get_text().split("\n")[0] for text in right.texts] == ["+30.0"] * 3
    assert [label.get_text() for label in left.get_xticklabels()] == ["10", "100"]
    assert gain_map(study, []) is None


def test_a_map_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"map\.method: 'no' is no key of methods"):
        make(tmp_path, method="no")
    with pytest.raises(ValueError, match=r"map\.coordinates: 'd' is no key of cells: a, b, c"):
        make(tmp_path, coordinates={"d": (0.0, 0.0)})
    with pytest.raises(ValueError, match="two cells lie at the same place"):
        make(tmp_path, coordinates={"a": (0.0, 0.0), "b": (0.0, 0.0)})
