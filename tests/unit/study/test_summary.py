"""What the records of a study become in its tables."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.figures import Pictures, costs, draw_all, gains
from lwf_lightning.study.map import gain_map
from lwf_lightning.study.page import write_page
from lwf_lightning.study.pooled import pool
from lwf_lightning.study.statistics import adjusted_p_values, gain_over
from lwf_lightning.study.summary import summarize
from lwf_lightning.study.tables import cells_of, headings_of, markdown, pooled_table, tables

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
    shown = dict(zip(headings_of(study), cells_of(study, lines["twin"]), strict=True))
    assert shown["p, adjusted"] == ""
    assert shown["gain, points [95 % interval]"].startswith("+41.0 [")


def test_a_figure_that_was_not_measured_is_answered_with_those_that_were() -> None:
    message = "figure: vanilla-0 has no test/acuracy, only test/accuracy"
    with pytest.raises(ValueError, match=message):
        summarize(make(figure="test/acuracy"), records())


def test_a_lower_loss_is_a_gain_in_nats(tmp_path: Path) -> None:
    study = make(figure="test/loss", output=str(tmp_path), map={"size": {"a": 1.0}})
    found = records()
    for record in found:
        record["figures"] = {"test/loss": 3 - record["figures"]["test/accuracy"]}
    of_accuracy = {line.method: line for line in summarize(make(), records())}
    lines = {line.method: line for line in summarize(study, found)}
    for name, line in lines.items():
        like = of_accuracy[name]
        assert line.gain.mean == pytest.approx(3 - like.gain.mean)
        assert line.gain.gain == pytest.approx(like.gain.gain)
        assert line.gain.recovered == pytest.approx(like.gain.recovered)
    shown = dict(zip(headings_of(study), cells_of(study, lines["twin"]), strict=True))
    assert shown["mean, nats, lower is better"] == "2.078"
    assert shown["gain, nats [95 % interval]"].startswith("+0.410 [")
    axis = "test/loss below vanilla, nats"
    own = list(lines.values())
    pictures = [gains(study, own), gain_map(study, own)]
    assert pictures[0].axes[0].get_xlabel().startswith(axis)
    assert pictures[1].axes[0].get_ylabel().startswith(axis)
    write_page(study, own, [], [], [], [], Pictures(None, None, None, {}), tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "in nats of <code>test/loss</code>, of which less is better" in page


def test_a_ceiling_that_is_not_surely_above_leaves_a_dash(tmp_path: Path) -> None:
    study, found = make(output=str(tmp_path)), records()
    for record in found:
        if record["method"] == "twin":
            record["figures"] = {"test/accuracy": 0.55 if record["seed"] else 0.45}
    lines = summarize(study, found)
    shares = {line.method: cells_of(study, line)[5] for line in lines}
    assert shares == {"vanilla": "", "one": "-", "two": "-", "twin": "-"}
    write_page(
        study, lines, [], [], [], [], Pictures(None, None, None, {}), tmp_path / "index.html"
    )
    assert "a dash" in (tmp_path / "index.html").read_text()
    assert markdown(study, lines).count("No share (-): the gap's own") == 1
    assert "No share" not in markdown(study, summarize(study, records()))


def test_a_page_names_all_versions_and_keeps_the_pictures_of_cells_apart(tmp_path: Path) -> None:
    study = Study(**{**vars(make(output=str(tmp_path))), "cells": {"a": {}, "a: b": {}}})
    told = {"cells": list(study.cells), "commit": "c", "command": "fit"}
    found = [{**record, **told, "log": "none", "folder": "none"} for record in records()]
    for number, record in enumerate(found):
        record["versions"] = {"torch": "2.13" if number % 2 else "2.14", "python": "3.11"}
    drawn = draw_all(study, summarize(study, found), [], [], found)
    assert {cell: len(own) for cell, own in drawn.cells.items()} == {"a": 2, "a: b": 2}
    write_page(study, summarize(study, found), [], [], found, [], drawn, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "torch 2.14 and 2.13, python 3.11" in page
    assert page.count("<img") == 4


def test_a_run_that_cells_share_is_tested_once() -> None:
    study = Study(**{**vars(make()), "cells": {"a": {}, "b": {}, "c": {}}})
    shared = [record | {"cells": ["a", "b", "c"]} for record in records()]
    for record in shared:
        if record["method"] == "two":
            record["cells"] = ["a"]
    alone = {line.method: line.adjusted_p_value for line in summarize(make(), records())}
    found = {(line.cell, line.method): line.adjusted_p_value for line in summarize(study, shared)}
    assert found["a", "two"] == pytest.approx(alone["two"])
    assert [found[cell, "one"] for cell in "abc"] == pytest.approx([alone["one"]] * 3)


@pytest.mark.parametrize("method", ["one", "vanilla", "twin"])
@pytest.mark.filterwarnings("error")
def test_with_a_run_that_diverged_there_is_no_gain(method: str, tmp_path: Path) -> None:
    cells: dict[str, Any] = {"a": {}, "b": {}}
    study = Study(**vars(make(output=str(tmp_path))) | {"cells": cells, "map": {"x": {"a": 1.0}}})
    found = [record | {"cells": ["a"], "log": ".", "folder": "."} for record in records()]
    found += [r | {"cells": ["b"], "run": f"b-{r['run']}"} for r in found]
    for record in found:
        if record["run"] == f"{method}-2":
            record |= {"figures": {}, "diverged": "1 steps had a NaN"}
    lines = {line.method: line for line in summarize(study, found) if line.cell == "a"}
    left = [figure for seed, figure in enumerate(FIGURES[method]) if seed != 2]
    assert lines[method].gain.mean == pytest.approx(fmean(left))
    shown = {name: cells_of(study, line) for name, line in lines.items()}
    assert shown[method][:3] == (method, "3 of 4 seeds, 1 diverged", f"{100 * fmean(left):.1f}")
    assert shown[method][3:6] == ("", "", "")
    assert (shown["two"][3] == "") == (method == "vanilla")
    assert (shown["two"][5] == "") == (method in ("vanilla", "twin"))
    pooled = pool(study, found)
    row = next(row for row in pooled_table(study, pooled).rows if row[0] in (method, "two"))
    assert (row[4] == "") == (method != "twin")
    assert draw_all(study, list(lines.values()), pooled, [], found).map is not None


def test_before_training_is_step_zero_alone() -> None:
    found = records()
    for record in found:
        first = 0 if record["method"] == "one" else 24
        record["curves"] = {
            "forget/accuracy_other": [[first, 48], [0.5, 0.25]],
            "forget/seen_accuracy_other": [[first, 48], [0.75, 0.125]],
        }
    (table,) = tables(make(), summarize(make(), found))[1:]
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["one"] == ["other", "50.0", "25.0", "75.0", "12.5"]
    assert rows["two"] == ["other", "", "25.0", "", "12.5"]


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
    shown = dict(zip(headings_of(study), cells_of(study, lines["two"]), strict=True))
    assert (shown["time"], shown["memory"]) == ("", "")
    figure = costs(study, list(lines.values()))
    assert figure is not None
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.15 * 3)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "3.00", "", "1.00"]
