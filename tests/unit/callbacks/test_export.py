"""ExportCallback replaces an export of the very run, and nothing else."""

from __future__ import annotations

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
