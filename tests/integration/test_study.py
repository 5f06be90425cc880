"""A small study from its configuration to the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lwf_lightning.study import command, perform
from lwf_lightning.study.command import main, report
from lwf_lightning.study.config import Method, Study, Tuning
from lwf_lightning.study.missing import missing_runs
from lwf_lightning.study.results import read_records
from lwf_lightning.study.workers import perform_once, results_file


@pytest.fixture
def study(tmp_path: Path, make_config: Callable[..., Any]) -> Study:
    base = make_config(
        trainer={
            "max_steps": 2,
            "val_check_interval": 1,
            "check_val_every_n_epoch": None,
            "ascent_guard": False,
        },
        callbacks={"FisherCallback": {"probe_steps": 2, "save_tensors": False}},
        model={"unlearning_interval": 1},
        data={"evaluate_seen": True, "cache_dir": str(tmp_path / "cache")},
    )
    base["data"]["init_args"]["custom_tasks"]["forget"] = {"answer": "answer"}
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(base))
    return Study(
        name="small",
        base=str(file),
        methods={
            "vanilla": Method({"model.schedule": "never"}, uses_forgetting=False),
            "lwf": Method(label="LWF", space={"model.unlearning_scale": [0.1, 0.2]}),
        },
        cells={"learn": {}},
        seeds=[0, 1],
        tuning=Tuning(trials=2, seeds=[7]),
        output=str(tmp_path / "studies"),
    )


def test_a_study_tunes_compares_and_reports(study: Study) -> None:
    performed = 0
    while found := missing_runs(study):
        for run in found:
            assert perform_once(study, run) == "done"
            assert perform_once(study, run) == "recorded"
            performed += 1
    lines = [json.loads(line) for line in results_file(study).read_text().splitlines()]
    assert performed == len(lines)
    stages = sorted((line["stage"], line["method"]) for line in lines)
    assert stages.count(("comparison", "vanilla")) == stages.count(("comparison", "lwf")) == 2
    assert stages.count(("tuning", "lwf")) == 2
    for line in lines:
        assert 0 <= line["figures"]["test/accuracy"] <= 1
        assert line["seconds"] > 0
        assert line["peak_memory"] > 0
        assert Path(line["folder"], "run.yaml").exists()
    # one probe served all: seeds change the order of learning, not what is learned
    probes = list((study.folder / "shared" / "probes").glob("*.safetensors"))
    assert len(probes) == 1

    report(study, Console(quiet=True))
    page = (study.folder / "index.html").read_text()
    assert "LWF" in page
    assert page.count("data:image/png;base64,") == len(list(study.folder.glob("figures/*.png"))) > 2
    assert "http" not in page.replace("http-equiv", "")
    table = (study.folder / "results.md").read_text()
    assert "| LWF | 2 |" in table
    assert "elicited prompts: before" in table


def test_a_failed_run_says_where_to_look_and_leaves_no_record(study: Study) -> None:
    broken = Study(**{**vars(study), "cells": {"learn": {"data.data_dir": "nowhere"}}})
    outcome = perform_once(broken, missing_runs(broken)[0])
    assert outcome.startswith("failed: ")
    assert "output.txt" in outcome
    assert not results_file(broken).exists()


def test_a_run_that_diverges_is_recorded_and_not_done_again(study: Study) -> None:
    changes = {"model.schedule": "never", "model.max_skipped_steps": 0, "trainer.max_steps": 9}
    space = {"model.learning_rate": [1e20, 2e20]}
    given = {**vars(study), "methods": {"vanilla": Method(changes, space)}, "seeds": [0]}
    diverging = Study(**given)
    trials = missing_runs(diverging)
    assert [perform_once(diverging, run) for run in trials] == ["diverged"] * 2
    records = read_records(results_file(diverging))
    assert all("learning_rate" in record["diverged"] for record in records)
    assert not list(diverging.folder.glob("runs/*/*/checkpoints"))
    (compared,) = missing_runs(diverging)
    assert perform_once(diverging, compared) == "diverged"
    assert missing_runs(diverging) == []
    report(diverging, console := Console(record=True, width=200))
    assert "vanilla: 1 of its compared runs diverged" in console.export_text()
    assert (
        "| vanilla | 0 of 1 seeds, 1 diverged |  |" in (diverging.folder / "results.md").read_text()
    )


def test_a_misspelt_figure_fails_the_first_run_and_costs_no_fit(study: Study) -> None:
    methods = {"vanilla": study.methods["vanilla"]}
    given = {**vars(study), "tuning": None, "methods": methods}
    misspelt = Study(**{**given, "figure": "test/acuracy"})
    run = missing_runs(misspelt)[0]
    outcome = perform_once(misspelt, run)
    assert "measured no test/acuracy, only test/accuracy, test/loss (see" in outcome
    assert perform_once(Study(**given), run) == "done"
    assert read_records(results_file(study))[0]["resumed"]


def test_a_run_that_is_validated_before_training_alone_fails(study: Study) -> None:
    first = {"class_path": "lwf_lightning.callbacks.ValidateFirst"}
    changes: dict[str, Any] = {"model.schedule": "never", "trainer.callbacks": first}
    changes |= {"trainer.val_check_interval": None, "trainer.check_val_every_n_epoch": 1}
    tuning = Tuning(trials=1, seeds=[7])
    given = {**vars(study), "tuning": tuning, "methods": {"vanilla": Method(changes)}}
    short = Study(**given)
    told = "trainer.val_check_interval is 1 epoch, but the run ends at step 2"
    assert told in perform_once(short, missing_runs(short)[0])
    assert not results_file(short).exists()


def test_the_record_of_a_run_that_was_interrupted_says_so(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = missing_runs(study)[0]
    with monkeypatch.context() as broken:
        broken.setattr(perform, "read_curves", None)  # after the fit
        assert perform_once(study, run).startswith("failed: TypeError")
    assert perform_once(study, run) == "done"
    other = missing_runs(study)[0]
    assert perform_once(study, other) == "done"
    assert [record["resumed"] for record in read_records(results_file(study))] == [True, False]


def test_errors_of_the_command_are_one_line(
    capsys: pytest.CaptureFixture[Any], tmp_path: Path
) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "n",
                "base": "none.yaml",
                "methods": {"vanilla": {}},
                "cells": {"a": {}},
                "seeds": [0],
            }
        )
    )
    with pytest.raises(SystemExit):
        main(["--config", str(config), "--list"])
    assert capsys.readouterr().err == "error: base: none.yaml does not exist\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [],
            "are required: name, base, methods, cells, seeds: name a file that has them, as --con",
        ),
        (["--config", "configs/world.yaml"], "is not accepted: this is the configuration of a fit"),
        (
            ["--config", "configs/studies/world.yaml", "--workers", "0"],
            "--workers must be at least",
        ),
        (
            ["--config", "configs/studies/world.yaml", "--threads", "0"],
            "--threads must be at least",
        ),
    ],
)
def test_a_wrong_way_into_a_study_is_answered_with_the_right_one(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code != 0
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith("error: ")
    assert expected in error


def test_values_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ["true", "12", True, 12, 1.5, None, ["true", 1], {"a": "true", "b": [2, "x"]}]
    changes = {f"path.{number}": value for number, value in enumerate(values)}
    config, found = tmp_path / "study.yaml", []
    methods = {"vanilla": {"changes": changes, "space": {"path": values}}}
    study = {"name": "n", "base": "b.yaml", "methods": methods, "cells": {"a": changes}}
    study["tuning"] = {"trials": 1}
    config.write_text(yaml.safe_dump(study | {"seeds": [0]}))
    monkeypatch.setattr(command, "_act", lambda study, _: found.append(study))
    main(["--config", str(config)])
    assert found[0].methods["vanilla"].changes == changes
    assert found[0].methods["vanilla"].space == {"path": values}
    assert found[0].cells == {"a": changes}
