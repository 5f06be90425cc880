"""Runs of two processes in which one fails: the other does not wait for it for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FIT = ["fit", "--config", "../config.yaml", "--ckpt_path", "last"]
# Fails on one rank, as it is asked for a batch to forget.
SCRIPT = """
import os, sys
from lwf_lightning.cli import main
from lwf_lightning.datamodule import LWFDataModule

rank, count = sys.argv[1:3]
forget_batch, calls = LWFDataModule.forget_batch, 0

def failing(*args):
    global calls
    calls += 1
    if (calls, os.environ["LOCAL_RANK"]) == (int(count), rank):
        raise ValueError("the answer of row 3 was cut off whole")
    return forget_batch(*args)

LWFDataModule.forget_batch = failing
main(sys.argv[3:])
"""


@pytest.fixture
def run(model_folder: Path, data_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command line on two processes in a folder."""
    (tmp_path / "script.py").write_text(SCRIPT)
    trainer = {
        **{"max_steps": 7, "accelerator": "cpu", "devices": 2, "default_root_dir": "runs"},
        **{"enable_progress_bar": False, "limit_val_batches": 0, "log_every_n_steps": 1},
    }
    saver = "lwf_lightning.callbacks.StepCheckpoint"
    fisher = {"probe_steps": 2, "fisher_texts": 5, "batch_size": 4}
    callbacks = [
        {"class_path": "lwf_lightning.FisherCallback", "init_args": fisher},
        {"class_path": saver, "init_args": {"every_n_steps": 2, "keep": 9}},
    ]
    model = {"model_name": str(model_folder), "unlearning_interval": 2, "learning_rate": 1e-2}
    data = {
        **{"data_dir": str(data_folder), "learning_task": "learn", "forgetting_tasks": ["forget"]},
        "custom_tasks": {"learn": {"choices": "choices", "label": "label"}, "forget": {}},
        **{"batch_size": 2, "forget_batch_size": 2, "max_new_tokens": 4, "cache_dir": "cache"},
    }

    def start(folder: str, *moment: str) -> subprocess.CompletedProcess[str]:
        config = {
            "trainer": trainer | {"strategy": "ddp", "callbacks": callbacks},
            "model": {"class_path": "lwf_lightning.LWFModule", "init_args": model},
            "data": {"class_path": "lwf_lightning.LWFDataModule", "init_args": data},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / folder).mkdir(exist_ok=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
        return subprocess.run(
            [sys.executable, *torchrun, "../script.py", *moment, *FIT],
            cwd=tmp_path / folder,
            env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return start


def test_an_error_on_one_rank_ends_all_and_says_what_it_was(run: Any) -> None:
    ended = run("run", "1", "2")
    assert ended.returncode != 0
    assert "the answer of row 3 was cut off whole" in ended.stderr
