"""Launches the suites of DDP and FSDP2 on two processes, once: a start costs more than a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Make = Callable[..., Any]
SUITES = ("suite.py", "suite_edges.py", "suite_shards.py", "suite_fsdp2.py")


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
    launch(*SUITES)
    found = weights_after(1, kept / "of one again", kept / "of two" / "step=10.ckpt")
    torch.testing.assert_close(found, weights[10:], rtol=1e-12, atol=1e-12)

    in_shards, in_one_file = tmp_path / "True-False", tmp_path / "False-True"
    with pytest.raises(ValueError, match=r"step=2\.ckpt is a folder, as FSDP2 saves in shards"):
        weights_after(1, tmp_path / "of one", in_shards / "step=2.ckpt")
    with pytest.raises(ValueError, match=r"step=2\.ckpt was saved under FSDP2: go on with"):
        weights_after(1, tmp_path / "of one", in_one_file / "step=2.ckpt")
