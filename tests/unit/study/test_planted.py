"""Planted knowledge: what confidence finds of it, in records and tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lwf_lightning.forgetting.planted import confidence_by_part
from lwf_lightning.study.config import Method, Planted, Study
from lwf_lightning.study.planted import found_figures, told_of_unknown, with_found_figures
from lwf_lightning.study.summary import summarize
from lwf_lightning.study.tables import markdown

PARTS = ["old", "new", "old", "new", "new", "old", "new"]
CONFIDENCE = [900.0, 40.0, 40.0, 3.0, -1.0, -2.0, -70.0]  # far outside [0, 1], with a tie


@pytest.fixture
def study(tmp_path: Path) -> Study:
    truth = tmp_path / "train.jsonl"
    rows = [{"prompt": f"p{n}", "kind": part} for n, part in enumerate(PARTS)]
    truth.write_text("".join(json.dumps(row) + "\n" for row in rows))
    planted = Planted(str(truth), field="kind", value="old")
    methods = {"vanilla": Method(), "lwf": Method(label="LWF")}
    return Study(
        "small", "none.yaml", methods, {"a": {}}, [0, 1], planted=planted, output=str(tmp_path)
    )


def write_scores(folder: Path, chosen: int = 3) -> None:
    file = folder / "scores" / "step-000000.jsonl"
    file.parent.mkdir(parents=True)
    rows = [
        {"prompt": f"p{n}", "confidence": value, "selected": n < chosen}
        for n, value in enumerate(CONFIDENCE)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(method: str, seed: int, **given: Any) -> dict[str, Any]:
    run = f"{method}-{seed}"
    return {
        "run": run, "stage": "comparison", "cells": ["a"], "method": method, "seed": seed,
        "figures": {"test/accuracy": 0.5}, "curves": {}, "setting": {}, "seconds": 1.0,
        "peak_memory": 1, "folder": f"else/{run}", "log": f"else/{run}/version_0", **given,
    }  # fmt: skip


def test_area_counts_pairs_in_the_right_order(study: Study, tmp_path: Path) -> None:
    write_scores(tmp_path / "log")
    pairs = [
        1.0 if old > new else 0.5 if old == new else 0.0
        for old, of_old in zip(CONFIDENCE, PARTS, strict=True)
        for new, of_new in zip(CONFIDENCE, PARTS, strict=True)
        if of_old == "old" and of_new == "new"
    ]
    found = found_figures(study, tmp_path / "log")
    assert found == pytest.approx({"area": sum(pairs) / len(pairs), "precision": 2 / 3})
    assert found_figures(study, tmp_path / "nowhere") == {}


def test_nothing_sought_or_chosen_is_no_figure(study: Study, tmp_path: Path) -> None:
    write_scores(tmp_path / "log", chosen=0)
    assert study.planted is not None
    rows = Path(study.planted.rows)
    scores = confidence_by_part(tmp_path / "log", rows, field="kind", value="other")
    assert math.isnan(scores.area)
    assert math.isnan(scores.precision)
    assert set(found_figures(study, tmp_path / "log")) == {"area"}


def test_other_tasks_are_left_out(study: Study, tmp_path: Path) -> None:
    write_scores(tmp_path / "log")
    rows = [{"prompt": f"p{n}", "kind": PARTS[n]} for n in (0, 3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found_figures(study, tmp_path / "log") == {"area": 1.0, "precision": 1.0}
    rows = '\ufeff{"prompt": "p0 ", "kind": "old"}\n\n{"prompt": "p3\\n", "kind": "new"}\n'
    (tmp_path / "train.jsonl").write_text(rows)  # as tasks read it
    assert found_figures(study, tmp_path / "log") == {"area": 1.0, "precision": 1.0}
    rows = '{"kind": "old"}\n{"prompt": "another", "kind": "old"}\n'
    (tmp_path / "train.jsonl").write_text(rows)
    assert found_figures(study, tmp_path / "log") == {}


def test_older_records_are_completed_from_their_folders(study: Study) -> None:
    write_scores(study.folder / "runs" / "lwf-0" / "version_0")
    known = {"area": 0.25, "precision": 0.0}
    records = [record("vanilla", 0), record("lwf", 0), record("lwf", 1, **known)]
    plain, completed, kept = with_found_figures(study, records)
    assert "area" not in plain
    assert kept == records[2]
    assert completed["precision"] == pytest.approx(2 / 3)
    lines = summarize(study, [plain, completed])
    assert f"| LWF | {completed['area']:.3f} | 0.667 |" in markdown(study, lines)
    assert "ROC" not in markdown(study, summarize(study, [plain]))


def test_what_is_sought_now_is_shown(study: Study, tmp_path: Path) -> None:
    write_scores(study.folder / "runs" / "lwf-0" / "version_0")
    known = {"area": 0.25, "precision": 0.0, "planted": asdict(study.planted)}
    records = [record("lwf", 0, **known), record("lwf", 1, **known)]  # one with its scores
    scored, kept = with_found_figures(study, records)
    assert scored["precision"] == pytest.approx(2 / 3)
    assert kept["area"] == 0.25
    other = Study(**{**vars(study), "planted": replace(study.planted, value="new")})
    scored, stale = with_found_figures(other, records)
    assert scored["precision"] == pytest.approx(1 / 3)
    assert "area" not in stale
    nothing = Study(**{**vars(study), "planted": None})
    found = with_found_figures(nothing, records)
    assert not any("area" in record for record in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": "nowhere.jsonl"}, r"planted\.rows: nowhere\.jsonl does not exist"),
        ({"field": "knd"}, r"planted\.field: no row of .* has 'knd', only prompt, kind"),
        ({"value": "odl"}, r"planted\.value: no row of .* holds 'odl' as kind, only new, old"),
    ],
)
def test_what_is_misspelt_is_refused_at_once(
    study: Study, given: dict[str, Any], message: str
) -> None:
    assert study.planted is not None
    with pytest.raises(ValueError, match=message):
        Study(**{**vars(study), "planted": replace(study.planted, **given)})


def test_rows_of_other_prompts_are_told(study: Study, tmp_path: Path) -> None:
    write_scores(study.folder / "runs" / "lwf-0" / "version_0")
    records = [record("vanilla", 0), record("lwf", 0)]
    assert told_of_unknown(study, with_found_figures(study, records)) == []
    (tmp_path / "train.jsonl").write_text('{"prompt": "another", "kind": "old"}\n')
    (told,) = told_of_unknown(study, with_found_figures(study, records))
    assert "holds none of the 7 prompts that the runs scored" in told
    assert told_of_unknown(study, records[:1]) == []
