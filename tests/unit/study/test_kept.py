"""What validation keeps of a number of runs: against all draws, one by one."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats
from torch.testing import assert_close

from lwf_lightning.study.config import Method, Study, Tuning
from lwf_lightning.study.kept import Kept, kept, kept_curves, kept_figure
from lwf_lightning.study.matrix import comparison_runs, tuning_runs
from lwf_lightning.study.tables import kept_table, markdown


def one_by_one(validations: list[float], figures: list[float], runs: int) -> float:
    """The mean over all draws; runs that validate alike share a draw."""
    chosen_by = [-math.inf if math.isnan(v) else v for v in validations]
    found = []
    for draw in combinations(range(len(figures)), runs):
        best = max(chosen_by[place] for place in draw)
        found.append(fmean(figures[place] for place in draw if chosen_by[place] == best))
    return fmean(found)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("values", [2, 4, 100])
def test_the_kept_figure_is_the_mean_over_all_draws(count: int, values: int) -> None:
    source = np.random.default_rng([count, values])
    validations = [float(v) for v in source.integers(values, size=count)]  # few values: ties
    if count > 2:
        validations[1], validations[2] = math.nan, -math.inf
    figures = [float(f) for f in source.uniform(size=count)]
    for runs in range(1, count + 1):
        expected = one_by_one(validations, figures, runs)
        assert_close(kept_figure(validations, figures, runs), expected, rtol=1e-12, atol=0)


def test_of_one_run_it_is_the_mean_and_of_all_the_best() -> None:
    validations, figures = [0.3, 0.9, 0.5], [0.8, 0.6, 0.1]
    assert kept_figure(validations, figures, 1) == pytest.approx(0.5)
    assert kept_figure(validations, figures, 3) == 0.6


@pytest.mark.parametrize("runs", [0, 4])
def test_more_runs_than_there_are_cannot_be_drawn(runs: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 3, got {runs}"):
        kept_figure([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], runs)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Four cells, c and d of which share the runs of the pull, which does not forget."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"schedule": "ahead"}, "data": {}}))
    tasks = {"a": "a", "b": "b", "c": "c", "d": "c"}
    space = {"model.rate": [1.0, 2.0, 3.0]}
    return {
        "name": "kept",
        "base": str(base),
        "output": str(tmp_path),
        "cells": {
            cell: {"data.learning_task": task, "data.forgetting_tasks": [cell]}
            for cell, task in tasks.items()
        },
        "methods": {
            "pull": Method({"model.schedule": "never"}, space, uses_forgetting=False),
            "ahead": Method({"model.way": "ahead"}, space),
            "beside": Method({"model.way": "beside"}, space),
            "twin": Method({"model.way": "twin"}),
        },
        "baseline": "pull",
        "best_of": {"LWF": ["ahead", "beside"]},
        "seeds": [0, 1],
        "tuning": Tuning(trials=3, seeds=[7, 8]),
    }


def records_of(study: Study) -> list[dict[str, Any]]:
    """Every trial with figures drawn by its name, and the runs of the comparison."""
    records = []
    trials = tuning_runs(study)
    for place, run in enumerate(trials):
        source = np.random.default_rng(place)
        value, figure = source.integers(4), source.uniform(0.3, 0.9)
        records.append(
            {
                "run": run.identity, "stage": run.stage, "cells": list(run.cells),
                "method": run.method, "seed": run.seed, "setting": dict(run.setting),
                "seconds": 1.0, "peak_memory": 1, "figures": {study.figure: float(figure)},
                "curves": {study.validation_figure: [[1], [float(value)]]},
            }
        )  # fmt: skip
    compared = comparison_runs(study, records)
    return records + [
        records[0] | {"run": run.identity, "stage": "comparison", "method": run.method,
                      "cells": list(run.cells), "seed": run.seed, "figures": {study.figure: 0.01}}
        for run in compared
    ]  # fmt: skip


def line_of(lines: list[Kept], method: str, runs: int) -> Kept:
    (line,) = (line for line in lines if (line.method, line.runs) == (method, runs))
    return line


def by_hand(study: Study, records: list[dict[str, Any]], ways: set[str], runs: int) -> list[float]:
    """Of each cell."""
    sign = -1 if study.figure.endswith("loss") else 1
    found = []
    for cell in study.cells:
        own = [r for r in records if r["method"] in ways and cell in r["cells"]]
        own = [r for r in own if r["stage"] == "tuning"]
        chosen_by = [sign * r["curves"][study.validation_figure][1][-1] for r in own]
        found.append(one_by_one(chosen_by, [r["figures"][study.figure] for r in own], runs))
    return found


@pytest.mark.parametrize("figure", ["test/accuracy", "test/loss"])
def test_gains_are_those_of_as_many_runs_of_the_baseline(
    given: dict[str, Any], figure: str
) -> None:
    study = Study(**given, figure=figure)
    records = records_of(study)
    lines = kept(study, records)
    assert {(line.method, line.runs) for line in lines} == {
        *((method, runs) for method in ("pull", "ahead", "beside") for runs in (1, 2, 4, 6)),
        *(("LWF", runs) for runs in (1, 2, 4, 8, 12)),
        *(("twin", runs) for runs in (1, 2)),  # one setting
    }
    sign = -1 if figure == "test/loss" else 1
    for ways, method in (({"ahead"}, "ahead"), ({"ahead", "beside"}, "LWF")):
        for runs in (1, 4, 6):
            if (method, runs) == ("LWF", 6):
                continue
            line = line_of(lines, method, runs)
            own, beside = (by_hand(study, records, of, runs) for of in (ways, {"pull"}))
            gains = [sign * (x - y) for x, y in zip(own, beside, strict=True)]
            groups = [gains[0], gains[1], fmean(gains[2:])]  # c and d share the pull's runs
            half = stats.t.ppf(0.975, 2) * stats.sem(groups)
            expected = fmean([own[0], own[1], fmean(own[2:])]), fmean(groups)
            assert_close((line.figure, line.gain), expected, rtol=1e-12, atol=1e-15)
            ends = (fmean(groups) - half, fmean(groups) + half)
            assert_close((line.low, line.high), ends, rtol=1e-9, atol=1e-12)
    assert math.isnan(line_of(lines, "LWF", 8).gain)  # the pull has six
    assert math.isnan(line_of(lines, "pull", 2).gain)
    shuffled = [records[place] for place in np.random.default_rng(0).permutation(len(records))]
    again = kept(study, shuffled)
    for line, other in zip(lines, again, strict=True):
        one, two = ((x.figure, x.gain, x.low) for x in (line, other))
        assert_close(one, two, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_cells_without_all_trials_are_left_out(given: dict[str, Any]) -> None:
    study = Study(**given)
    records = records_of(study)
    lost = next(r for r in records if r["method"] == "ahead" and r["cells"] == ["b"])
    left = [record for record in records if record is not lost]
    line = line_of(kept(study, left), "LWF", 4)
    own, beside = (by_hand(study, records, of, 4) for of in ({"ahead", "beside"}, {"pull"}))
    gains = [x - y for x, y in zip(own, beside, strict=True)]
    assert_close(line.gain, fmean([gains[0], fmean(gains[2:])]), rtol=1e-12, atol=0)
    assert_close(line_of(kept(study, left), "beside", 1).figure,
                 line_of(kept(study, records), "beside", 1).figure)  # fmt: skip
    none = [r for r in records if r["method"] != "pull"]
    assert kept(study, none) == []


def test_a_trial_that_diverged_is_never_kept_if_another_is_there(given: dict[str, Any]) -> None:
    study = Study(**given)
    records = records_of(study)
    place = next(n for n, r in enumerate(records) if r["method"] == "beside")
    records[place] |= {"diverged": "NaN", "figures": {}, "curves": {}}
    lines = kept(study, records)
    assert math.isnan(line_of(lines, "beside", 1).figure)
    assert not math.isnan(line_of(lines, "beside", 2).figure)
    row = next(row for row in kept_table(study, lines).rows if row[0] == "beside")
    assert row[1] == ""
    assert row[2] != ""


def test_without_tuning_nothing_is_kept(given: dict[str, Any]) -> None:
    methods = {name: Method(m.changes) for name, m in given["methods"].items()}
    study = Study(**(given | {"methods": methods, "tuning": None, "best_of": {}}))
    assert kept(study, []) == []
    assert kept_curves(study, []) is None


def test_the_table_has_a_column_per_number_of_runs(given: dict[str, Any]) -> None:
    study = Study(**given)
    lines = kept(study, records_of(study))
    table = kept_table(study, lines)
    assert table.headings == ("method", "1 run", *(f"best of {n}" for n in (2, 4, 6, 8, 12)))
    rows = {row[0]: row for row in table.rows}
    line = line_of(lines, "LWF", 4)
    told = f"{100 * line.figure:.1f}, {100 * line.gain:+.1f} [{100 * line.low:+.1f}, "
    assert rows["LWF"][3].startswith(told)
    assert rows["LWF"][4] == ""
    assert "[" not in rows["LWF"][5]
    assert all("[" not in cell for cell in rows["pull"])
    assert table.title in markdown(study, [], kept=lines)


def test_the_picture_has_the_baseline_and_the_eight_best(given: dict[str, Any]) -> None:
    space = {"model.rate": [1.0, 2.0, 3.0]}
    more = {f"way_{n}": Method({"model.way": f"way_{n}"}, space) for n in range(9)}
    study = Study(**(given | {"methods": given["methods"] | more}))
    lines = kept(study, records_of(study))
    figure = kept_curves(study, lines)
    assert figure is not None
    shown = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    last = {m: max((x for x in lines if x.method == m), key=lambda x: x.runs) for m in study.methods
            if any(x.method == m for x in lines)}  # fmt: skip
    last["LWF"] = line_of(lines, "LWF", 12)
    best = sorted(last.keys() - {"pull"}, key=lambda m: -last[m].figure)[:8]
    assert shown.keys() == {"pull", *best}
    name = best[0]
    assert float(np.asarray(shown[name].get_ydata())[-1]) == pytest.approx(100 * last[name].figure)


def test_what_lacks_cells_says_so_and_is_not_drawn(given: dict[str, Any]) -> None:
    """Its mean is over other cells than the baseline's, and may be higher for that alone."""
    study = Study(**given)
    records = records_of(study)
    lost = next(r for r in records if r["method"] == "ahead" and r["cells"] == ["b"])
    lines = kept(study, [record for record in records if record is not lost])
    assert line_of(lines, "ahead", 1).cells == line_of(lines, "LWF", 1).cells == 3
    rows = [row[0] for row in kept_table(study, lines).rows]
    assert rows == ["pull", "ahead, in 3 of 4 cells", "beside", "twin", "LWF, in 3 of 4 cells"]
    figure = kept_curves(study, lines)
    assert figure is not None
    assert {line.get_label() for line in figure.axes[0].get_lines()} == {"pull", "beside", "twin"}


def test_the_best_are_drawn_whatever_has_no_figure(given: dict[str, Any]) -> None:
    space = {"model.rate": [1.0, 2.0, 3.0]}
    more = {f"way_{n}": Method({"model.way": f"way_{n}"}, space) for n in range(9)}
    study = Study(**(given | {"methods": more | given["methods"]}))
    records = records_of(study)
    for row in records:
        if row["method"] == "way_0":
            row |= {"diverged": "NaN", "figures": {}, "curves": {}}
    figure = kept_curves(study, kept(study, records))
    assert figure is not None
    shown = {str(line.get_label()): np.asarray(line.get_ydata())[-1]
             for line in figure.axes[0].get_lines()}  # fmt: skip
    assert "way_0" not in shown
    last = {line.method: line.figure for line in kept(study, records)}
    assert shown.keys() - {"pull"} == set(
        sorted(last.keys() - {"pull", "way_0"}, key=lambda m: -last[m])[:8]
    )
