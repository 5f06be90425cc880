"""A run is judged by its last validation, which must not be the one before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lwf_lightning.study import command
from lwf_lightning.study.length import last_validation_of
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.validated import by_configuration, check_validations


def run(**trainer: Any) -> Run:
    given = {"val_check_interval": 30, "check_val_every_n_epoch": None, **trainer}
    return Run("tuning", ("a",), "lwf", 0, {}, {"trainer": given})


@pytest.mark.parametrize(
    ("interval", "every", "steps", "last"),
    [
        (4, None, 15, 12),
        (20, None, 15, 0),
        (None, 1, 15, 12),
        (None, 1, 5, 0),
        (0.5, 1, 16, 15),
        (4, 1, 15, 10),
        (4, 1, 11, 10),
        (0.5, 2, 16, 12),
        (0.5, 3, 16, 15),
        (0.5, 2, 8, 0),
        (None, 2, 30, 24),
    ],
)
def test_the_last_validation_is_lightning_s(
    interval: float | None, every: int | None, steps: int, last: int
) -> None:
    settings = {"val_check_interval": interval, "check_val_every_n_epoch": every}
    assert last_validation_of(settings, batches=6, steps=steps) == last


def test_a_run_that_is_validated_before_training_alone_is_refused() -> None:
    short = run(max_steps=12)
    with pytest.raises(
        ValueError,
        match=rf"{short.identity}: trainer\.val_check_interval is 30, .*step 12 \(trainer\.max_ste",
    ):
        check_validations(by_configuration([run(max_steps=30), short]))


def test_runs_that_learn_on_after_their_last_validation_are_told_once() -> None:
    runs = [run(max_steps=45), run(max_steps=45), run(max_steps=60)]
    (told,) = check_validations(by_configuration(runs))
    assert told.startswith("Warning: 2 runs of lwf are validated last at step 30 of 45")


def test_runs_that_are_compared_may_do_without() -> None:
    short = replace(run(max_steps=12), stage="comparison")
    assert check_validations(by_configuration([short])) == []


def test_what_a_configuration_leaves_open_is_left_to_the_fit() -> None:
    runs = [
        run(max_steps=12, check_val_every_n_epoch=1),
        run(max_steps=12, max_epochs=2),
        run(max_steps=12, val_check_interval=0.5),
        run(max_epochs=1),
        Run("tuning", ("a",), "lwf", 0, {}, {}),
    ]
    assert list(by_configuration(runs)) == []


@pytest.mark.parametrize("arguments", [[], ["--only", "NAME"]])
def test_a_study_says_so_before_it_performs_anything(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = {"max_steps": 12, "val_check_interval": 30, "check_val_every_n_epoch": None}
    base, file = tmp_path / "base.yaml", tmp_path / "study.yaml"
    base.write_text(yaml.safe_dump({"trainer": trainer}))
    study = {"name": "n", "base": str(base), "output": str(tmp_path), "methods": {"vanilla": {}}}
    tuning = {"trials": 1, "seeds": [7]}
    file.write_text(yaml.safe_dump({**study, "cells": {"a": {}}, "seeds": [0], "tuning": tuning}))
    command.main(["--config", str(file), "--list"])
    name = capsys.readouterr().out.split()[0]
    with pytest.raises(SystemExit):
        command.main(["--config", str(file), *(name if a == "NAME" else a for a in arguments)])
    assert "trainer.val_check_interval is 30" in capsys.readouterr().err
