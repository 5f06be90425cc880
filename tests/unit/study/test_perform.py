"""What a run is given, and the reading of its own memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.perform import (
    commit,
    forget_peak_memory,
    peak_memory,
    read_curves,
    write_config,
)


@pytest.mark.parametrize(
    "callbacks",
    [None, ["a.Other", "lwf_lightning.FisherCallback"], [{"class_path": "FisherCallback"}]],
)
def test_runs_share_their_probes(tmp_path: Path, callbacks: list[Any] | None) -> None:
    study = Study("s", "none", {"vanilla": Method()}, {"a": {}}, [0], output=str(tmp_path))
    run = Run("comparison", ("a",), "vanilla", 0, {}, {"trainer": {"callbacks": callbacks}})
    written = yaml.safe_load(write_config(study, run).read_text())["trainer"]["callbacks"]
    if callbacks is None:
        assert written is None
    else:
        shared = {"probe_folder": str(study.folder / "shared" / "probes"), "save_tensors": False}
        assert written[-1]["init_args"] == shared


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_peak_begins_anew() -> None:
    large = torch.ones(50_000_000)  # 200 MB
    high = peak_memory()
    del large
    forget_peak_memory()
    assert peak_memory() < high - 150e6


def test_on_a_gpu_its_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(1))
    forget_peak_memory()
    assert (peak_memory(), reset) == (7, [1])


def test_a_machine_without_git_knows_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() is None


def test_a_run_that_logged_nothing_is_told_what_to_leave_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.logger: the run wrote no .*metrics\.csv"):
        read_curves(tmp_path / "metrics.csv", ("val/",))
