"""The command line as a user meets it."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lwf_lightning import LWFDataModule, LWFModule, LWFTrainer
from lwf_lightning.cli import LWFCLI, SaveFitConfig, main
from lwf_lightning.cli_errors import plain_warnings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, make_config: Callable[..., Any]) -> dict[str, Any]:
    options: dict[str, Any] = make_config(
        trainer={
            "max_steps": 4,
            "default_root_dir": str(tmp_path / "runs"),
            "val_check_interval": 2,
        },
        callbacks={
            "FisherCallback": {"probe_steps": 2, "fisher_texts": 5},
            "ValidateFirst": {},
        },
        model={"unlearning_interval": 2},
        data={"cache_dir": str(tmp_path / "cache")},
    )
    return options


@pytest.fixture
def run(tmp_path: Path, config: dict[str, Any]) -> Callable[..., Any]:
    def call(command: str, *arguments: str) -> Any:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return main([command, "--config", str(path), *arguments])

    return call


def test_fit_then_validate_test_and_predict(
    run: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fitted = run("fit")
    folder = Path(fitted.trainer.log_dir)
    assert f"The run is in {folder}" in caplog.text
    assert "D_self: 24 texts, 0 empty ones dropped" in caplog.text
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "fisher", "scores"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["val/accuracy"]] == [0, 2, 4]
    scalars = EventAccumulator(str(folder)).Reload().Tags()
    assert {"train/loss", "unlearn/nll", "forget/alpha", "val/accuracy"} <= set(scalars["scalars"])
    assert "forget/confidence" in scalars["histograms"]
    assert "forget/texts/text_summary" in scalars["tensors"]
    for figure in (
        *("train/loss", "train/learning_rate", "unlearn/loss", "unlearn/nll", "val/accuracy"),
        *("val/loss", "forget/accuracy_forget", "forget/alpha", "forget/texts_selected"),
    ):
        assert figure in header
    checkpoint = str(next((folder / "checkpoints").glob("*.ckpt")))
    before = (folder / "config.yaml").read_text()
    tested = run("test", "--ckpt_path", "last").trainer.callback_metrics
    assert 0 <= tested["test/accuracy"] <= 1
    assert "step" not in tested
    assert "weights of the base model" not in caplog.text
    base = run("test").trainer.callback_metrics
    assert "These are the weights of the base model; --ckpt_path last takes" in caplog.text
    assert base["test/loss"] != tested["test/loss"]
    run("export", "--ckpt_path", "last", "--output", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "val/accuracy" in run("validate", "--ckpt_path", checkpoint).trainer.callback_metrics
    predicted = Path(run("predict", "--ckpt_path", checkpoint).trainer.log_dir)
    rows = [json.loads(line) for line in (predicted / "predictions.jsonl").open()]
    assert len(rows) == 5
    assert set(rows[0]) == {"prompt", "answer", "read", "reference", "correct"}
    assert (folder / "config.yaml").read_text() == before


def test_a_saved_configuration_runs_again(
    run: Callable[..., Any], config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["ckpt_path"] = "last"
    saved = Path(run("fit").trainer.log_dir) / "config.yaml"
    again = main(["fit", "--config", str(saved)])
    assert again.trainer.global_step == 4
    assert Path(again.trainer.log_dir).name == "version_1"
    run("estimate")  # of no use to it
    main(["estimate", "--config", str(saved)])
    assert capsys.readouterr().out.count("Fisher") >= 2


def test_a_command_line_of_ones_own_goes_on_in_its_run(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))

    def fit(*arguments: str) -> LWFCLI:
        return LWFCLI(
            LWFModule,
            LWFDataModule,
            trainer_class=LWFTrainer,
            save_config_callback=SaveFitConfig,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=["fit", f"--config={path}", *arguments],
        )

    for steps in ("2", "4"):
        cli = fit("--ckpt_path=last", f"--trainer.max_steps={steps}")
    assert cli.trainer.global_step == 4
    (run,) = (tmp_path / "runs").iterdir()
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    file = run / "checkpoints" / "step-000002.ckpt"  # and with arguments of its own from a file
    cli = fit(f"--ckpt_path={file}", "--model.init_args.learning_rate=0.25")
    assert cli.model.hparams["learning_rate"] == 0.25


@pytest.mark.parametrize("subcommand", ["elicit", "score"])
def test_a_folder_as_output_is_refused_before_any_work(
    subcommand: str, run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(subcommand, "--output", str(tmp_path))
    said = capsys.readouterr().err
    assert f"--output {tmp_path} is a folder: name a file in it" in said
    assert "Eliciting" not in said


def test_score_writes_what_a_person_can_read(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "scores.jsonl"
    run("score", "--output", str(output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert "texts scored" in capsys.readouterr().out
    assert list(rows[0]) == [
        *("task", "row", "prompt", "answer", "alignment", "sensitivity", "confidence", "selected")
    ]
    confidences = [row["confidence"] for row in rows]
    assert confidences == sorted(confidences, reverse=True)
    chosen = sum(row["selected"] for row in rows)
    assert chosen == -(-len(rows) // 8)
    assert all(row["selected"] for row in rows[:chosen])


def test_score_leaves_nothing_but_its_output(
    run: Callable[..., Any], config: dict[str, Any], tmp_path: Path
) -> None:
    exported = {
        "class_path": "lwf_lightning.ExportCallback",
        "init_args": {"folder": str(tmp_path / "out")},
    }
    config["trainer"]["callbacks"].append(exported)
    config["trainer"]["min_steps"] = 3
    for _ in range(2):
        assert run("score", "--output", str(tmp_path / "s.jsonl")).trainer.global_step == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "config.yaml", "s.jsonl"}
    run("fit")
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(SystemExit):  # before anything is trained
        run("fit")


def test_elicit_needs_no_fisher_callback(
    run: Callable[..., Any], config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"]["callbacks"] = []
    run("elicit", "--output", str(tmp_path / "answers.jsonl"))
    assert (tmp_path / "answers.jsonl").read_text().count("\n") == 24


def test_elicit_writes_answers_and_the_second_run_takes_them_from_the_cache(
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "answers.jsonl"
    caplog.set_level("INFO")
    run("elicit", "--output", str(output))
    assert "FisherCallback" not in caplog.text  # nothing is scored
    first = output.read_text()
    assert set(json.loads(first.splitlines()[0])) == {"task", "row", "prompt", "answer"}

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("generated again")

    # the package offers the function of the same name, so the module is asked for by path
    module = importlib.import_module("lwf_lightning.forgetting.elicit")
    monkeypatch.setattr(module, "generate_answers", forbidden)
    run("elicit", "--output", str(output))
    assert output.read_text() == first


MISTAKES = {
    "--model.init_args.learning_rat 3": "no option 'learning_rat'; did you mean 'learning_rate'?",
    "--trainer.max_stps 3": "--trainer.max_stps 3; did you mean --trainer.max_steps?",
    "--model.init_args.objective bogus": "objective: expected one of 'gradient_ascent'",
    "--data.init_args.learning_task nope": "unknown task 'nope'; known: gsm8k, qasc",
    "--data.init_args.data_dir /nowhere": "/nowhere",
    "--model.init_args.model_name ./nowhere": "model.init_args.model_name",
    "--model.init_args.unlearning_interval 0": "unlearning_interval must be at least 1",
    "--ckpt_path latest": "no such file or folder; the newest run's is last",
    "--ckpt_path best": "--ckpt_path best: no ModelCheckpoint of this trainer has chosen one",
    "--ckpt_path missing.ckpt": "--ckpt_path missing.ckpt: there is no such file or folder",
    "--trainer.callbacks+=lwf_lightning.ExportCalback": "did you mean 'ExportCallback'?",
    "--trainer.precision 16-true": "trainer.precision 16-true is not supported",
    "--trainer.precision 16-mixed": "trainer.precision 16-mixed is not supported",
    "--trainer.precision bf17": "--trainer.precision: ",
    "--trainer.gradient_clip_val 1": "set model.init_args.max_grad_norm",
    "--trainer.accumulate_grad_batches 4": "set model.init_args.tokens_per_pass",
    "--trainer.overfit_batches 1": "set data.init_args.learning_texts",
    "--trainer.devices 0": "devices",
    "--data.init_args.forgetting_tasks qasc": "_tasks: expected a list, as [a, b], or null",
    "--model.init_args.learning_rate abc": "learning_rate: expected a number, got abc",
    "--trainer.callbacks.forgetting_rate 2": "has no option 'forgetting_rate' (a flag goes to the "
    "last callback of the list; set the others' in the file; all: --trainer.callbacks.help",
    "--trainer.accelerator gpu": "this machine has no such device; take cpu or auto",
    "--model.init_args.lora.r x": "x",
}


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES.items())
def test_a_mistake_is_answered_in_one_line(
    arguments: str,
    expected: str,
    run: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", *arguments.split())
    assert stop.value.code != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_help_says_what_a_checkpoint_path_does_here(
    subcommand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    told = text.split("--ckpt_path CKPT_PATH ", 1)[1].split(" --", 1)[0]
    assert "newest run of this configuration" in told
    assert ("evaluates the base model" in told) is (subcommand != "fit")
    assert "best" not in told


def test_no_bar_shows_where_the_trainer_has_none(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bars = {"Eliciting", "Fisher", "Scoring"}
    found = {}
    for shown in ("true", "false"):
        capsys.readouterr()
        run("fit", "--trainer.enable_progress_bar", shown)
        printed = capsys.readouterr()
        found[shown] = {bar for bar in bars if f"{bar}:" in printed.err + printed.out}
    assert found == {"true": bars, "false": set()}


def test_each_figure_of_a_test_is_printed_once_and_whole(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli = run("test")
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "/" in line]
    printed = {row[1].strip(): row[2].strip() for row in rows}
    assert len(printed) == len(rows) > 2
    assert printed == {
        name: f"{float(value):.4f}" for name, value in cli.trainer.callback_metrics.items()
    }


def test_a_fit_of_nothing_names_the_way_in(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit"])
    error, tip = capsys.readouterr().err.splitlines()[-2:]
    assert "required: fit.data, fit.model: name a file that has them, as --config conf" in error
    assert tip.endswith(" fit --help")


def test_a_warning_is_one_line_without_the_source_that_gave_it() -> None:
    with plain_warnings():
        assert warnings.formatwarning("2 cut", UserWarning, "a.py", 3) == "warning: 2 cut\n"
        assert "a.py:3" in warnings.formatwarning("old", DeprecationWarning, "a.py", 3)


def test_a_damaged_checkpoint_is_named_in_one_line(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.ckpt").write_bytes(b"PK half a checkpoint")
    with pytest.raises(SystemExit) as stop:
        run(
            *("fit", "--model.init_args.schedule", "never"),
            *("--ckpt_path", str(tmp_path / "cut.ckpt")),
        )
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {tmp_path / 'cut.ckpt'} is cut short, damaged or no checkpoint "
        "(its end is missing)"
    ]


def test_mistakes_in_a_yaml_are_answered_too(
    run: Callable[..., Any], config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"]["callbacks"][0]["init_args"]["forgetting_rat"] = 0.1
    with pytest.raises(SystemExit):
        run("fit")
    assert "did you mean 'forgetting_rate'?" in capsys.readouterr().err
    del config["trainer"]["callbacks"][0]["init_args"]["forgetting_rat"]
    config["trainer"]["callbacks"][0]["init_args"]["forgetting_rate"] = 1.5
    with pytest.raises(SystemExit):
        run("fit")
    assert "error: forgetting_rate must lie in (0, 1], got 1.5" in capsys.readouterr().err


def test_help_and_import_do_not_load_what_they_do_not_need() -> None:
    code = "import sys, lwf_lightning; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    done = subprocess.run(
        [sys.executable, "cli.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    for command in ("fit", "validate", "test", "predict", "elicit", "score"):
        assert command in done.stdout
