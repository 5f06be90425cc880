"""Launches the suites of this folder on two processes: a rank that hangs is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SUITES = [str(Path(__file__).with_name(name)) for name in ("suite.py", "suite_edges.py")]


def test_two_processes_equal_one(
    results_of: Callable[[str, int], dict[str, Any]], runs: list[str], tmp_path: Path
) -> None:
    torch.save({name: results_of(name, 1) for name in runs}, tmp_path / "one_process.pt")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(
                "-m",
                "pytest",
                "-x",
                "-W",
                "ignore",
                "--tb=short",
                "--show-capture=no",
                "-p",
                "no:cacheprovider",
                *SUITES,
            ),
        ],
        env=kept
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LWF_TEST_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-3000:]
