"""Launches FSDP2's suites on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]
RUNS = (
    "probe",
    "online, true Fisher, npo",
    "one text to forget",
    "fewer texts than ranks",
    "guarded, nothing to push on one rank",
    "replay, generated",
)


def test_two_processes_with_half_of_the_weights_each_equal_one(
    results_of: Make, write_files: Make, weights_after: Make, launch: Make, tmp_path: Path
) -> None:
    torch.save({name: results_of(name, 1) for name in RUNS}, tmp_path / "one_process.pt")
    write_files(1, tmp_path / "one")
    weights_after(1, tmp_path / "checkpoints" / "of one")
    launch("fsdp2", "suite.py", "suite_shards.py", "suite_fsdp2.py")
    in_shards, in_one_file = tmp_path / "True-False", tmp_path / "False-True"
    with pytest.raises(ValueError, match=r"step=2\.ckpt is a folder, as FSDP2 saves in shards"):
        weights_after(1, tmp_path / "of one", in_shards / "step=2.ckpt")
    with pytest.raises(ValueError, match=r"step=2\.ckpt was saved under FSDP2: go on with"):
        weights_after(1, tmp_path / "of one", in_one_file / "step=2.ckpt")
