"""Launches DDP's suites on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Make = Callable[..., Any]


def test_two_processes_equal_one(
    results_of: Make,
    write_files: Make,
    weights_after: Make,
    runs: list[str],
    launch: Make,
    tmp_path: Path,
) -> None:
    torch.save({name: results_of(name, 1) for name in runs}, tmp_path / "one_process.pt")
    write_files(1, tmp_path / "one")
    kept = tmp_path / "checkpoints"
    weights = weights_after(1, kept / "of one")
    torch.save(weights, tmp_path / "weights.pt")
    launch("ddp", "suite.py", "suite_edges.py")
    found = weights_after(1, kept / "of one again", kept / "of two" / "step=14.ckpt")
    torch.testing.assert_close(found, weights[14:], rtol=1e-12, atol=1e-12)
