"""Launches DDP's suites on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Make = Callable[..., Any]


def test_two_processes_equal_one(
    results_of: Make, runs: list[str], launch: Make, tmp_path: Path
) -> None:
    torch.save({name: results_of(name, 1) for name in runs}, tmp_path / "one_process.pt")
    launch("ddp", "suite.py", "suite_edges.py")
