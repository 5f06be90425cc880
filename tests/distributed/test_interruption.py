"""Runs of two processes in which one fails or is killed: nothing hangs, nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from lwf_lightning.fsdp2 import check_sharded

ROOT = Path(__file__).parents[2]
FIT = ["fit", "--config", "../config.yaml", "--ckpt_path", "last"]
# Fails on the second rank, as it is asked for its second batch to forget.
FAILING = """
import os, sys
from lwf_lightning.cli import main
from lwf_lightning.datamodule import LWFDataModule

forget_batch, calls = LWFDataModule.forget_batch, 0

def failing(*args):
    global calls
    calls += 1
    if (calls, os.environ["LOCAL_RANK"]) == (2, "1"):
        raise ValueError("the answer of row 3 was cut off whole")
    return forget_batch(*args)

LWFDataModule.forget_batch = failing
main(sys.argv[1:])
"""
# Is killed once all shards of a checkpoint are written, and not yet what makes it whole.
KILLED = """
import os, signal, sys
import torch
from lwf_lightning.cli import main

save = torch.save

def killed(content, file, *args, **options):
    if str(file).endswith("step-000004.ckpt/meta.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file, *args, **options)

torch.save = killed
main(sys.argv[1:])
"""
LEFT_ALONE = "import sys; from lwf_lightning.cli import main; main(sys.argv[1:])"


@pytest.fixture
def run(model_folder: Path, data_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command line on two processes in a folder."""
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

    fsdp2 = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }

    def start(folder: str, script: str, sharded: bool = False) -> subprocess.CompletedProcess[str]:
        config = {
            "trainer": trainer | {"strategy": fsdp2 if sharded else "ddp", "callbacks": callbacks},
            "model": {"class_path": "lwf_lightning.LWFModule", "init_args": model},
            "data": {"class_path": "lwf_lightning.LWFDataModule", "init_args": data},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "script.py").write_text(script)
        (tmp_path / folder).mkdir(exist_ok=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
        return subprocess.run(
            [sys.executable, *torchrun, "../script.py", *FIT],
            cwd=tmp_path / folder,
            env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


def last_tensors(run: Path) -> dict[str, Any]:
    """Weights and optimizers of the last checkpoint, put together from their shards."""
    path = max((run / "checkpoints").iterdir())
    index = check_sharded(path).state_dict_metadata
    tensors = {key for key, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
    return _load_state_dict_from_keys(tensors, checkpoint_id=path)


def test_an_error_on_one_rank_ends_all_and_says_what_it_was(run: Any) -> None:
    ended = run("run", FAILING)
    assert ended.returncode != 0
    assert "the answer of row 3 was cut off whole" in ended.stderr


@pytest.mark.slow
def test_with_shards_killed_within_a_checkpoint_it_ends_the_same(run: Any, tmp_path: Path) -> None:
    done = run("whole", LEFT_ALONE, sharded=True)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = run("cut", KILLED, sharded=True)
    assert killed.returncode != 0
    assert str(-signal.SIGKILL) in re.findall(r"exitcode *: (-?\d+)", killed.stderr)
    whole, cut = (tmp_path / name / "runs" / "version_0" for name in ("whole", "cut"))
    saved = cut / "checkpoints" / "step-000004.ckpt"
    assert sorted(f.name for f in saved.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    done = run("cut", LEFT_ALONE, sharded=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step-000004.ckpt is not whole: meta.pt is missing" in done.stderr
    assert "step-000002.ckpt" in done.stderr
    assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    expected = last_tensors(whole)
    assert set(expected) == {"state_dict", "optimizer_0", "optimizer_1"}
    torch.testing.assert_close(last_tensors(cut), expected, rtol=0, atol=0)
