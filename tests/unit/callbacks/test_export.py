"""ExportCallback replaces an export of the very run, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lwf_lightning import ExportCallback
from lwf_lightning.models import load_model

Make = Callable[..., Any]


def test_a_folder_of_that_name_that_is_not_the_runs_is_left_alone(
    make_module: Make, make_data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # the log_dir of Lightning's Trainer without loggers
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[ExportCallback()],
    )
    with pytest.raises(ValueError, match="model exists already: name another folder"):
        trainer.fit(make_module(schedule="never"), make_data())
    assert trainer.global_step == 0
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("logger", [True, False])
def test_a_run_that_goes_on_replaces_its_own_export(
    logger: bool,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    for steps in (1, 2):
        module = make_module(schedule="never")
        trainer = make_trainer(max_steps=steps, logger=logger, callbacks=[ExportCallback()])
        trainer.fit(module, make_data(), ckpt_path="last")
        exported = load_model(tmp_path / "runs" / "version_0" / "model").state_dict()
        assert all(
            weight.equal(exported[name]) for name, weight in module.model.state_dict().items()
        )
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"model", "version_0"}
    assert not any((tmp_path / "runs" / "model").iterdir())


def test_a_named_folder_is_replaced_by_the_run_that_wrote_it_and_by_no_other(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "out"

    def fit(steps: int, ckpt_path: str | None, **model: Any) -> Any:
        module = make_module(schedule="never", **model)
        trainer = make_trainer(max_steps=steps, callbacks=[ExportCallback(str(folder))])
        trainers.append(trainer)
        trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        return module.model.state_dict()

    def holds(weights: dict[str, Any]) -> bool:
        exported = load_model(folder).state_dict()
        return all(weight.equal(exported[name]) for name, weight in weights.items())

    trainers: list[Any] = []
    assert holds(fit(1, "last"))
    second = fit(2, "last")
    assert holds(second)
    assert holds(fit(2, "last"))  # a run that has finished
    last = trainers[-1].run_folder / "checkpoints" / "step-000002.ckpt"
    for ckpt_path in (str(last), None, "last"):
        if ckpt_path == "last":  # a new run in a folder of the same name
            shutil.rmtree(tmp_path / "runs")
        with pytest.raises(ValueError, match="out exists already: name another folder"):
            fit(4, ckpt_path, learning_rate=3e-3)
        assert trainers[-1].global_step == 0
    assert holds(second)
