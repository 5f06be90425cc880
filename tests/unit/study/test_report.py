"""A report counts what the study asks for now, whatever else is recorded."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from lwf_lightning.study import command
from lwf_lightning.study.command import report
from lwf_lightning.study.config import Method, Study, Tuning
from lwf_lightning.study.matrix import Run, asked_for
from lwf_lightning.study.missing import missing_runs
from lwf_lightning.study.results import append_record, read_records
from lwf_lightning.study.tables import markdown_table
from lwf_lightning.study.workers import results_file

NEVER: dict[str, Any] = {"model.schedule": "never"}
FORGOTTEN = "data.forgetting_tasks"


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"lr": 1.0}, "data": {"learning_task": "a"}}))
    return {
        "name": "small",
        "base": str(base),
        "output": str(tmp_path),
        "methods": {
            "vanilla": Method(NEVER, uses_forgetting=False),
            "lwf": Method(space={"model.lr": [1.0, 2.0]}),
        },
        "cells": {"a-b": {FORGOTTEN: ["b"]}, "a-c": {FORGOTTEN: ["c"]}},
        "seeds": [0, 1],
        "tuning": Tuning(trials=2, seeds=[7]),
    }


def record(study: Study, run: Run, best: float) -> None:
    """Trials of one learning rate are the best; a test figure tells learning rate and seed."""
    rate = run.setting.get("model.lr", 1.0)
    log = str(study.folder / "runs" / run.identity)
    append_record(
        results_file(study),
        {
            "run": run.identity, "stage": run.stage, "cells": list(run.cells), "seed": run.seed,
            "method": run.method, "setting": dict(run.setting), "seconds": 1.0, "peak_memory": 1,
            "figures": {"test/accuracy": rate / 10 + run.seed / 100}, "folder": log, "log": log,
            "curves": {"val/accuracy": [[1], [0.9 if rate == best else 0.5]]},
            "commit": "c", "versions": {}, "command": "fit",
        },
    )  # fmt: skip


def perform(study: Study, best: float = 2.0) -> None:
    while runs := missing_runs(study):
        for run in runs:
            record(study, run, best)


def counted(study: Study, cell: str = "a-b") -> list[tuple[str, int, float]]:
    """Method, seed and learning rate of the comparison records of a cell."""
    return sorted(
        (r["method"], r["seed"], r["setting"].get("model.lr", 0.0))
        for r in asked_for(study, read_records(results_file(study)))
        if r["stage"] == "comparison" and cell in r["cells"]
    )


def test_another_choice_of_tuning_leaves_the_old_runs_out(given: dict[str, Any]) -> None:
    perform(Study(**given))
    study = Study(**given | {"tuning": Tuning(trials=2, seeds=[7, 8])})
    perform(study, best=1.0)  # the new seed makes both equal, and the first is chosen
    assert [found for found in counted(study) if found[0] == "lwf"] == [
        ("lwf", 0, 1.0),
        ("lwf", 1, 1.0),
    ]
    console = Console(record=True, width=200)
    report(study, console)
    assert "4 records that the study no longer asks for are left out" in console.export_text()
    assert "| lwf | 2 | 10.5 |" in (study.folder / "results.md").read_text()
    for file in ("results.md", "index.html"):
        assert "chosen by val/accuracy from up to 2 trials" in (study.folder / file).read_text()
    # two seeds of lwf in each of two cells and two of vanilla for both; twice as many trials of lwf
    page = (study.folder / "index.html").read_text()
    assert "6 runs compared and 10 for tuning" in page
    for heading in ("chosen setting", "command"):  # long, so it may be wrapped where it stands last
        tables = [part.split("</thead>")[0] for part in page.split("<table")[1:]]
        wide = [table for table in tables if f"<th>{heading}</th>" in table]
        assert wide
        assert all(table.startswith(' class="words-last"') for table in wide)
        assert all(table.endswith(f"<th>{heading}</th></tr>") for table in wide)


def told_by_a_report(study: Study) -> str:
    console = Console(record=True, width=200)
    report(study, console)
    return console.export_text()


def test_of_trials_alone_it_says_what_validation_keeps(given: dict[str, Any]) -> None:
    study = Study(**given)
    for run in missing_runs(study):
        if run.stage == "tuning":
            record(study, run, 2.0)
    told = told_by_a_report(study)
    assert "Nothing to compare yet: no run of the comparison is recorded" in told
    assert (study.folder / "figures" / "kept.png").stat().st_size > 0
    for file in ("results.md", "index.html"):
        assert "the run that validation keeps of as many" in (study.folder / file).read_text()


@pytest.mark.parametrize("cells", [1, 2])
def test_the_comparison_comes_before_the_runs_that_validation_keeps(
    given: dict[str, Any], cells: int
) -> None:
    study = Study(**given | {"cells": dict(list(given["cells"].items())[:cells])})
    while runs := missing_runs(study):  # those of the comparison follow from the trials
        for run in runs:
            record(study, run, 2.0)
    told_by_a_report(study)
    for file, mark in (("results.md", "## "), ("index.html", "<h2>")):
        told = (study.folder / file).read_text()
        first = f"{mark}{'a-b' if cells == 1 else 'all cells'}"
        kept = told.index(f"{mark}the run that validation keeps")
        assert told.index(first) < kept
        assert (told.index(f"{mark}a-b") < kept) == (cells == 1)


def test_a_report_names_what_is_missing(given: dict[str, Any]) -> None:
    study = Study(**given)
    trial, *others = [run for run in missing_runs(study) if run.stage == "tuning"]
    for run in others:
        record(study, run, 2.0)
    told = told_by_a_report(study)
    assert f"vanilla: its tuning lacks 1 of the runs that it chooses by: {trial.identity}" in told
    assert "Nothing to compare yet: no run of the comparison is recorded" in told
    record(study, next(run for run in missing_runs(study) if run.method == "lwf"), 2.0)
    assert "no run of the baseline, vanilla, is recorded" in told_by_a_report(study)
    record(study, trial, 2.0)
    first, last = [run for run in missing_runs(study) if run.method == "vanilla"]
    record(study, first, 2.0)
    report(study, Console(quiet=True))
    for file in ("results.md", "index.html"):
        told = (study.folder / file).read_text()
        assert f"Not there yet: vanilla: the comparison lacks 1: {last.identity}" in told


@pytest.mark.parametrize("baseline", ["vanilla", "lwf"])
def test_results_say_of_what_they_are(given: dict[str, Any], baseline: str) -> None:
    one_cell = {"cells": {"a-b": given["cells"]["a-b"]}, "baseline": baseline}
    study = Study(**given | one_cell)
    perform(study)
    report(study, Console(quiet=True))
    told = (study.folder / "results.md").read_text().splitlines()
    assert told[:3] == ["# Study: small", "", f"test/accuracy; gains are against {baseline}."]
    page = (study.folder / "index.html").read_text()
    assert f"Gains are differences to {baseline}, seed by seed" in page
    assert "median seconds" in page
    assert "peak resident memory of the whole process, Python and torch included" in page


@pytest.mark.parametrize("flag", ["--flops", "--data_dir"])
def test_what_only_check_reads_is_refused_without_it(
    given: dict[str, Any], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(given["output"], "study.yaml")
    file.write_text(yaml.safe_dump(given | {"tuning": None, "methods": {"vanilla": {}}}))
    with pytest.raises(SystemExit):
        command.main(["--config", str(file), flag, "1"])
    assert capsys.readouterr().err.startswith(f"error: {flag} is of --check alone")


def test_names_are_printed_as_they_are(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(given["output"], "study.yaml")
    methods = {"vanilla": {}, "p[bold]": {}}
    file.write_text(yaml.safe_dump(given | {"tuning": None, "methods": methods}))
    command.main(["--config", str(file), "--list"])
    assert "\np[bold]-0-" in capsys.readouterr().out


def test_a_bar_in_a_label_ends_no_cell_of_a_table() -> None:
    assert markdown_table(["p(x|y)"], [["a|b"]]) == ["| p(x\\|y) |", "|---|", "| a\\|b |"]


@pytest.mark.parametrize("arguments", [[], ["--only"]])
def test_a_failed_run_is_a_failed_command(
    given: dict[str, Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"tuning": None, "methods": {"vanilla": {}}, "name": "with [bold]brackets"}
    study = Study(**given | {"methods": {"vanilla": Method()}})
    first = missing_runs(study)[0]

    def fail_all(study: Study, runs: list[Run], *, told: Any, **_: Any) -> None:
        for run in runs:
            told(run, "failed: no")

    monkeypatch.setattr(command, "perform_all", fail_all)
    monkeypatch.setattr(command, "limit_threads", lambda threads: None)  # this process's own
    monkeypatch.setattr(command, "perform_once", lambda study, run: "failed: no")
    file = study.folder.parent / "study.yaml"
    file.write_text(yaml.safe_dump(given))
    named = [first.identity] if arguments else []
    with pytest.raises(SystemExit) as stop:
        command.main(["--config", str(file), *arguments, *named])
    assert stop.value.code == 1


def test_a_named_run_has_the_threads_that_are_asked_for_and_may_be_recorded(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given |= {"tuning": None, "methods": {"vanilla": {}}}
    study = Study(**given | {"methods": {"vanilla": Method()}})
    name = missing_runs(study)[0].identity
    usual, found = torch.get_num_threads(), []

    def perform(study: Study, run: Run) -> str:
        found.append((torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"]))
        record(study, run, 1.0)
        return "done"

    for variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # as it was, after the test
    monkeypatch.setattr(command, "perform_once", perform)
    file = study.folder.parent / "study.yaml"
    file.write_text(yaml.safe_dump(given))
    try:
        for _ in range(2):  # the second time another job has done it
            command.main(["--config", str(file), "--threads", "3", "--only", name])
    finally:
        torch.set_num_threads(usual)
    assert found == [(3, "3")]
    assert capsys.readouterr().out.splitlines() == ["done", f"{name} is recorded already"]
    with pytest.raises(SystemExit):
        command.main(["--config", str(file), "--only", "nothing"])
    assert "no run of this study is named nothing; see --list" in capsys.readouterr().err


def test_an_interrupted_study_says_how_it_goes_on(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "perform_all", interrupted)
    file = Path(given["output"], "study.yaml")
    file.write_text(yaml.safe_dump(given | {"tuning": None, "methods": {"vanilla": {}}}))
    with pytest.raises(SystemExit) as stop:
        command.main(["--config", str(file)])
    assert stop.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted: the same command goes on where it was\n"


@pytest.mark.parametrize("flags", [["--list", "--report"], ["--only", "a", "--report"]])
def test_two_flags_that_stop_are_refused(
    given: dict[str, Any], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(given["output"], "study.yaml")
    file.write_text(yaml.safe_dump(given | {"tuning": None, "methods": {"vanilla": {}}}))
    with pytest.raises(SystemExit):
        command.main(["--config", str(file), *flags])
    assert f"{flags[0]} and --report: each does one thing" in capsys.readouterr().err


def test_seeds_may_be_dropped_or_turn_from_tuning_to_comparison(given: dict[str, Any]) -> None:
    perform(Study(**given))
    study = Study(**given | {"seeds": [1]})
    assert {seed for _, seed, _ in counted(study)} == {1}
    methods = {"vanilla": Method(NEVER, uses_forgetting=False)}
    study = Study(**given | {"seeds": [7], "tuning": None, "methods": methods})
    assert missing_runs(study) == []
    assert counted(study) == [("vanilla", 7, 0.0)]


def test_an_added_cell_takes_its_share_of_runs_that_are_there(given: dict[str, Any]) -> None:
    perform(Study(**given))
    mixed = {FORGOTTEN: ["b", "c"]}  # what runs that do not forget are evaluated on already
    study = Study(**given | {"cells": given["cells"] | {"mixed": mixed}})
    perform(study)
    assert [method for method, _, _ in counted(study, "mixed")] == ["lwf", "lwf"] + 2 * ["vanilla"]


def test_runs_of_a_cell_that_was_dropped_are_left_out(given: dict[str, Any]) -> None:
    perform(Study(**given))
    study = Study(**given | {"cells": {"a-b": given["cells"]["a-b"]}})
    cells = [r["cells"] for r in asked_for(study, read_records(results_file(study)))]
    assert cells == [["a-b"]] * 4  # two trials of lwf and their comparison; vanilla's are others
