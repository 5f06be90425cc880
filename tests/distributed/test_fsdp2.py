"""Launches FSDP2's suites on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Make = Callable[..., Any]
RUNS = (
    "probe",
    "online, true Fisher, npo",
    "one text to forget",
    "fewer texts than ranks",
    "replay, generated",
)


def test_two_processes_with_half_of_the_weights_each_equal_one(
    results_of: Make, launch: Make, tmp_path: Path
) -> None:
    torch.save({name: results_of(name, 1) for name in RUNS}, tmp_path / "one_process.pt")
    launch("fsdp2", "suite.py", "suite_shards.py", "suite_fsdp2.py")
