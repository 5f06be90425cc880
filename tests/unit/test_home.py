"""Folders that are given as `~/...` lie in the user's home."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwf_lightning import FisherCallback
from lwf_lightning.callbacks import ExportCallback
from lwf_lightning.tasks import TaskFields

Make = Callable[..., Any]


def test_every_folder_may_lie_in_the_home(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    data_folder: Path,
    tmp_path: Path,
    empty_working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(data_folder, home / "data")
    shutil.move(home / "data" / "forget", home / "mine")

    def fit(steps: int, **options: Any) -> Any:
        trainer = make_trainer(
            max_steps=steps,
            default_root_dir="~/runs",
            callbacks=[
                FisherCallback(probe_folder="~/probes", probe_steps=1),
                ExportCallback(folder="~/model"),
            ],
        )
        data = make_data(
            data_dir="~/data",
            cache_dir="~/cache",
            custom_tasks={
                "learn": TaskFields(choices="choices", label="label"),
                "forget": TaskFields(folder="~/mine"),
            },
        )
        trainer.fit(make_module(), data, **options)
        return trainer

    assert Path(fit(2).run_folder) == home / "runs" / "version_0"
    assert Path(fit(4, ckpt_path="last").run_folder) == home / "runs" / "version_0"
    assert (home / "model" / "config.json").is_file()
    assert list((home / "probes").glob("*.safetensors"))
    assert list((home / "cache").glob("*.jsonl"))
    assert list(empty_working_folder.iterdir()) == []
