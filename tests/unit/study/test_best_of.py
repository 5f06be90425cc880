"""Validation picks one way among several, cell by cell, and its runs become a line of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats
from torch.testing import assert_close

from lwf_lightning.study.command import report
from lwf_lightning.study.config import Method, Study, Tuning
from lwf_lightning.study.figures import costs, gains, learning_curves
from lwf_lightning.study.matrix import Run, asked_for, best_way
from lwf_lightning.study.missing import missing_runs
from lwf_lightning.study.pooled import Pooled, pool
from lwf_lightning.study.results import append_record, read_records
from lwf_lightning.study.summary import summarize
from lwf_lightning.study.tables import cells_of, headings_of, pooled_table, tables
from lwf_lightning.study.workers import results_file

VALIDATED = {("ahead", "a"): 0.9, ("beside", "a"): 0.5, ("ahead", "b"): 0.4, ("beside", "b"): 0.7}
"""Of the better of two settings; plain fine-tuning has 0.6 everywhere."""


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"rate": 1.0}, "data": {"learning_task": "task"}}))
    space = {"model.rate": [1.0, 2.0]}
    return {
        "name": "ways",
        "base": str(base),
        "output": str(tmp_path),
        "methods": {
            "vanilla": Method({"model.way": "none"}),
            "ahead": Method({"model.way": "ahead"}, space, label="LWF, ahead"),
            "beside": Method({"model.way": "beside"}, space),
        },
        "best_of": {"LWF": ["ahead", "beside"]},
        "cells": {"a": {"model.name": "a"}, "b": {"model.name": "b"}},
        "seeds": [0, 1, 2],
        "tuning": Tuning(trials=2, seeds=[7, 8]),
    }


def figure_of(method: str, cell: str, seed: int) -> float:
    """A figure of the comparison, without a pattern that a mean could hide."""
    return float(np.random.default_rng([len(method), ord(cell), seed]).uniform(0.3, 0.9))


def perform(
    study: Study, sign: int = 1, validated: Mapping[tuple[str, str], float] = VALIDATED
) -> list[dict[str, Any]]:
    """Records every run; the second learning rate validates best."""
    while runs := missing_runs(study):
        for run in runs:
            best = validated.get((run.method, run.cells[0]), 0.6)
            _record(study, run, sign * (best - 0.1 * (run.setting.get("model.rate") == 1.0)))
    return asked_for(study, read_records(results_file(study)))


def _record(study: Study, run: Run, validated: float) -> None:
    cell = run.cells[0]
    append_record(
        results_file(study),
        {
            "run": run.identity, "stage": run.stage, "cells": list(run.cells), "seed": run.seed,
            "method": run.method, "setting": dict(run.setting), "seconds": 1.0, "peak_memory": 1,
            "figures": {study.figure: figure_of(run.method, cell, run.seed)},
            "curves": {study.validation_figure: [[1], [validated + run.seed / 1000]]},
            "folder": "none", "log": "none", "commit": "c", "versions": {}, "command": "fit",
        },
    )  # fmt: skip


def test_each_cell_has_the_way_that_validated_best(given: dict[str, Any]) -> None:
    study = Study(**given)
    records = perform(study)
    by_run = {record["run"]: record for record in records}
    assert [best_way(study, "LWF", cell, by_run) for cell in study.cells] == ["ahead", "beside"]
    lines = {(line.cell, line.method): line for line in summarize(study, records)}
    assert (lines["a", "LWF"].way, lines["b", "LWF"].way) == ("ahead", "beside")
    for cell, way in (("a", "ahead"), ("b", "beside")):
        assert repr(lines[cell, "LWF"].gain) == repr(lines[cell, way].gain)
    shown = dict(zip(headings_of(study), cells_of(study, lines["a", "LWF"]), strict=True))
    assert shown["chosen setting"] == "LWF, ahead: rate 2"


def test_of_a_loss_the_lowest_is_the_best(given: dict[str, Any]) -> None:
    tuning = Tuning(trials=2, seeds=[7, 8], figure="val/loss")
    study = Study(**given | {"figure": "test/loss", "tuning": tuning})
    by_run = {record["run"]: record for record in perform(study, sign=-1)}
    assert [best_way(study, "LWF", cell, by_run) for cell in study.cells] == ["ahead", "beside"]


def test_it_waits_for_every_trial_of_every_way(given: dict[str, Any]) -> None:
    study = Study(**given)
    records = perform(study)
    lacking = next(r for r in records if r["stage"] == "tuning" and r["method"] == "beside")
    others = [record for record in records if record is not lacking]
    lines = summarize(study, others)
    (cell,) = lacking["cells"]
    assert (cell, "LWF") not in {(line.cell, line.method) for line in lines}
    assert (cell, "ahead") in {(line.cell, line.method) for line in lines}


def test_its_runs_are_no_second_comparison_and_no_second_row_of_what_a_run_tells(
    given: dict[str, Any],
) -> None:
    study = Study(**given)
    records = perform(study)
    alone = summarize(Study(**given | {"best_of": {}}), records)
    both = [line for line in summarize(study, records) if line.way is None]
    assert [a.adjusted_p_value for a in alone if a.method != "vanilla"] == [
        b.adjusted_p_value for b in both if b.method != "vanilla"
    ]
    own = [line for line in summarize(study, records) if line.cell == "a"]
    assert len(own) == 4
    assert len(tables(study, own)) == 1
    figure = costs(study, own)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "vanilla", "LWF, ahead", "beside"]  # fmt: skip


def test_it_can_be_what_others_are_measured_against(given: dict[str, Any]) -> None:
    study = Study(**given | {"baseline": "LWF"})
    lines = {(line.cell, line.method): line for line in summarize(study, perform(study))}
    differences = [figure_of("vanilla", "b", s) - figure_of("beside", "b", s) for s in study.seeds]
    assert lines["b", "vanilla"].gain.gain == pytest.approx(np.mean(differences))
    assert lines["b", "beside"].gain.gain == 0.0
    report(study, Console(quiet=True))
    page = (study.folder / "index.html").read_text(encoding="utf-8")
    assert "all cells, against LWF" in page
    assert 'alt="gain over all cells"' in page
    assert (study.folder / "figures" / "pooled.png").is_file()


def test_before_a_way_is_picked_a_report_says_what_it_waits_for(given: dict[str, Any]) -> None:
    study = Study(**given | {"baseline": "LWF"})
    for run in missing_runs(study):
        if run.stage == "comparison" or run.method != "beside":
            _record(study, run, 0.5)
    for run in missing_runs(study):
        if run.stage == "comparison":
            _record(study, run, 0.5)
    console = Console(record=True, width=300)
    report(study, console)
    assert "once all trials of its ways are" in console.export_text()


def test_curves_of_a_best_of_are_those_of_the_way_it_picked(given: dict[str, Any]) -> None:
    study = Study(**given)
    runs = [r for r in perform(study) if r["stage"] == "comparison" and r["cells"] == ["b"]]
    figure = learning_curves(Study(**given | {"baseline": "LWF"}), runs, "beside")
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["LWF", "method of panel"]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "vanilla",
        "LWF, ahead",
    ]


def pooled_of(study: Study, records: list[dict[str, Any]]) -> dict[str, Pooled]:
    return {line.method: line for line in pool(study, records)}


@pytest.mark.parametrize("figure", ["test/accuracy", "test/loss"])
def test_all_cells_together_as_computed_by_hand(given: dict[str, Any], figure: str) -> None:
    study = Study(**given | {"figure": figure})
    sign = -1 if figure == "test/loss" else 1
    line = pooled_of(study, perform(study, sign))["LWF"]
    own, gains = [], []
    for cell, way in (("a", "ahead"), ("b", "beside")):
        own.append([figure_of(way, cell, seed) for seed in study.seeds])
        gains.append(
            [
                sign * (o - figure_of("vanilla", cell, s))
                for o, s in zip(own[-1], study.seeds, strict=True)
            ]
        )
    assert (line.cells, line.gain.seeds) == (2, 6)
    assert line.above == sum(gain > 0 for of_cell in gains for gain in of_cell)
    assert_close(line.gain.mean, float(np.mean(own)))
    of_cells = np.mean(gains, axis=1)
    half = stats.t.ppf(0.975, 1) * stats.sem(of_cells)
    assert_close((line.low, line.high), (of_cells.mean() - half, of_cells.mean() + half))
    # With other seeds in these cells: the spread within each of them alone.
    squared = [np.var(of_cell, ddof=1) / 3 for of_cell in gains]
    freedom = sum(squared) ** 2 / sum(part**2 / 2 for part in squared)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(squared)) / 2
    assert_close((line.gain.low, line.gain.high), (of_cells.mean() - half, of_cells.mean() + half))


def test_cells_with_the_same_runs_count_once(given: dict[str, Any]) -> None:
    study = Study(**given)
    records = perform(study)
    for record in records:  # as if a third cell differed in what is forgotten alone
        if record["method"] in ("vanilla", "ahead") and record["cells"] == ["a"]:
            record["cells"] = ["a", "c"]
    wider = Study(**given | {"cells": {**study.cells, "c": {}}, "best_of": {}})
    assert repr(pooled_of(wider, records)["ahead"]) == repr(pooled_of(study, records)["ahead"])
    assert pooled_of(wider, records)["ahead"].cells == 2


def test_a_choice_of_the_baseline_counts_in_every_cell(given: dict[str, Any]) -> None:
    """Twice it gains nothing, once something: what the rule gains on average is a third of that."""
    cells = {name: {"data.forgetting_tasks": [name]} for name in "abc"}
    methods = {"vanilla": Method({"model.schedule": "never"}, uses_forgetting=False),
               "ahead": given["methods"]["ahead"]}  # fmt: skip
    study = Study(
        **given | {"cells": cells, "methods": methods, "best_of": {"best": ["vanilla", "ahead"]}}
    )
    validated = {("ahead", cell): value for cell, value in zip("abc", (0.3, 0.4, 0.9), strict=True)}
    line = pooled_of(study, perform(study, validated=validated))["best"]
    gains = [figure_of("ahead", "c", seed) - figure_of("vanilla", "a", seed) for seed in range(3)]
    assert (line.cells, line.gain.seeds) == (3, 9)
    assert_close(line.gain.gain, float(np.mean(gains)) / 3)


def test_cells_weigh_alike_however_many_seeds_they_have(given: dict[str, Any]) -> None:
    study = Study(**given)
    records = [r for r in perform(study) if not (r["cells"] == ["b"] and r["seed"] in (1, 2))]
    line = pooled_of(study, records)["ahead"]
    gains = {
        cell: [figure_of("ahead", cell, s) - figure_of("vanilla", cell, s) for s in seeds]
        for cell, seeds in (("a", (0, 1, 2)), ("b", (0,)))
    }
    assert_close(line.gain.gain, float(np.mean([np.mean(own) for own in gains.values()])))
    assert line.low < line.gain.gain < line.high


def test_one_cell_is_nothing_to_pool(given: dict[str, Any]) -> None:
    study = Study(**given | {"cells": {"a": {"model.name": "a"}}})
    assert pool(study, perform(study)) == []


def test_with_one_seed_there_is_no_interval_over_seeds(given: dict[str, Any]) -> None:
    study = Study(**given | {"seeds": [0]})
    line = pooled_of(study, perform(study))["ahead"]
    assert (line.cells, line.gain.seeds) == (2, 2)
    assert math.isnan(line.gain.low)
    assert line.low < line.gain.gain < line.high
    figure = gains(study, [line])
    assert figure is not None
    assert _segments(figure) == [[100 * line.low, 100 * line.high]]
    row = dict(zip(*_pooled_row(study, line), strict=True))
    assert row["gain, points [95 %, other seeds]"] == f"{100 * line.gain.gain:+.1f}"
    assert row["[95 %, other cells]"] == f"[{100 * line.low:+.1f}, {100 * line.high:+.1f}]"


def test_both_intervals_are_drawn_and_named(given: dict[str, Any]) -> None:
    study = Study(**given)
    line = pooled_of(study, perform(study))["LWF"]
    figure = gains(study, [line])
    assert figure is not None
    ends = ((line.low, line.high), (line.gain.low, line.gain.high))
    assert _segments(figure) == [[100 * low, 100 * high] for low, high in ends]
    label = figure.axes[0].get_xlabel().replace("\n", " ")
    assert "thick: 95 % interval with other seeds, thin, between ticks: with other cells" in label


def _segments(figure: Any) -> list[list[float]]:
    lines = [[float(x) for x in line.get_xdata()] for line in figure.axes[0].lines]
    return [ends for ends in lines if len(ends) == 2 and ends != [0, 0]]


def _pooled_row(study: Study, line: Pooled) -> tuple[Any, Any]:
    table = pooled_table(study, [line])
    return table.headings, table.rows[0]


def test_with_one_pair_there_is_no_interval(given: dict[str, Any]) -> None:
    study = Study(**given | {"seeds": [0]})
    records = [r for r in perform(study) if r["stage"] == "tuning" or r["cells"] == ["a"]]
    line = pooled_of(study, records)["ahead"]
    assert (line.cells, line.gain.seeds) == (1, 1)
    assert math.isnan(line.low)
    assert math.isnan(line.gain.low)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"best_of": {"beside": ["ahead", "beside"]}}, "best_of.beside: a method has this name"),
        ({"best_of": {"LWF": ["ahead"]}}, "best_of.LWF: needs at least two methods"),
        ({"best_of": {"LWF": ["ahead", "ahead"]}}, "best_of.LWF: needs at least two methods"),
        ({"best_of": {"LWF": ["ahead", "behind"]}}, "best_of.LWF: 'behind' is no key of methods"),
        ({"tuning": None, "methods": {m: Method() for m in ("vanilla", "ahead", "beside")}},
         "best_of.LWF: nothing is chosen without tuning"),
        ({"baseline": "plain"}, "baseline: 'plain' is no key of methods: vanilla, ahead, beside"),
        ({"ceiling": "LWF"}, "ceiling: 'LWF' is no key of methods"),
        ({"ceiling": "beside"}, "best_of.LWF: beside is the ceiling"),
        ({"best_of": {"LWF, ahead": ["ahead", "beside"]}}, "two are called 'LWF, ahead'"),
        ({"cells": {"a/b": {}}}, "cells: 'a/b' holds a slash"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_from_is_refused(
    given: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Study(**given | wrong)
