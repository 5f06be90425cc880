"""SIGTERM where no step is under way: nothing is to be saved, so the process leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lwf_lightning.callbacks import fisher

Make = Callable[..., Any]


class Told(L.Callback):
    """Sends this process SIGTERM in a hook, and counts the batches of evaluation."""

    def __init__(self, hook: str) -> None:
        self.batches = 0
        setattr(self, hook, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def _count(self, *_: Any) -> None:
        self.batches += 1

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _count


@pytest.mark.parametrize(
    ("entry", "hook"),
    [
        ("validate", "on_validation_batch_start"),
        ("test", "on_test_batch_start"),
        ("predict", "on_predict_batch_start"),
    ],
)
def test_an_evaluation_that_is_told_to_leave_does(
    entry: str,
    hook: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = Told(hook)
    trainer = make_trainer(callbacks=[told], limit_val_batches=2)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as left:
        getattr(trainer, entry)(make_module(), datamodule=make_data(evaluation="generate"))
    assert left.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: leaving" in caplog.text
    assert told.batches == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_scoring_that_is_told_to_leave_does(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def told(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fisher, "forgetting_confidence", told)
    trainer, data = make_trainer(callbacks=[make_callback()], max_steps=2), make_data()
    module, file = make_module(), tmp_path / "scores.jsonl"
    with pytest.raises(SystemExit) as left:
        trainer.score(module, data, output=str(file))
    assert left.value.code == 128 + signal.SIGTERM
    assert not file.exists()
    monkeypatch.undo()
    told_once = Told("on_train_batch_start")
    trainer.callbacks.append(told_once)
    with pytest.raises(SystemExit):  # a fit of the same trainer takes its step and saves
        trainer.fit(module, data)
    assert trainer.global_step == 1


def test_told_after_the_last_step_it_ends_the_fit_and_tests_nothing(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    told = Told("on_train_end")
    trainer, data = make_trainer(max_steps=1, callbacks=[told]), make_data()
    module = make_module(schedule="never")
    trainer.fit(module, data)
    with pytest.raises(SystemExit) as left:
        trainer.test(module, datamodule=data)
    assert left.value.code == 128 + signal.SIGTERM
    assert told.batches == 0
