"""A run that is killed, again and again, ends exactly as one that is left alone."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

_spec = importlib.util.spec_from_file_location("killable", Path(__file__).with_name("killable.py"))
assert _spec is not None
assert _spec.loader is not None
killable = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(killable)

Make = Callable[..., Any]
FIT = ["fit", "--config", "../config.yaml"]
RESUME = [*FIT, "--ckpt_path", "last"]


@pytest.fixture(scope="module")
def runner() -> Iterator[Any]:
    with killable.killable() as runner:
        yield runner


def configuration(make_config: Make, **model: Any) -> dict[str, Any]:
    fisher = {"anchor": "online", "refresh_interval": 3, "fisher_texts": 5, "batch_size": 4}
    lora = {
        "class_path": "peft.LoraConfig",
        "init_args": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.4},
    }
    config: dict[str, Any] = make_config(
        trainer={
            "max_steps": 9,  # of 6 to an epoch
            "default_root_dir": "runs",
            "log_every_n_steps": 2,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
        },
        callbacks={
            "FisherCallback": fisher,
            "ValidateFirst": {},
            "ExportCallback": {},
            "StepCheckpoint": {"every_n_steps": 2},
        },
        model={"learning_rate": 1e-2, "unlearning_interval": 2, "lora": lora, **model},
        data={"forget_batch_size": 3, "cache_dir": "cache"},
    )
    return config


class Whole:
    """A configuration, the run of it that was left alone, and how many calls that took."""

    def __init__(self, folder: Path, runner: Any, config: dict[str, Any]) -> None:
        self.folder, self.runner = folder, runner
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        status, self.calls = runner.run(folder / "whole", FIT, count_calls=True)
        assert status == 0, (folder / "whole" / "log").read_text()

    def interrupted(self, name: str, moments: list[dict[str, Any]]) -> Path:
        """Kills a run at each of the moments, then lets it end."""
        folder = self.folder / name
        for moment in moments:
            status, _ = self.runner.run(folder, RESUME, **moment)
            expected = moment.get("number", signal.SIGKILL)
            # one that has little left may end before its moment
            assert status in (0, -expected, 128 + expected), (folder / "log").read_text()
        status, _ = self.runner.run(folder, RESUME)
        assert status == 0, (folder / "log").read_text()
        return folder

    def check(self, folder: Path) -> None:
        """Compares a run with the one that was left alone."""
        check(folder, self.folder / "whole")


def check(folder: Path, whole: Path) -> None:
    """Compares a run that was interrupted with one that was not."""
    theirs, ours = folder / "runs" / "version_0", whole / "runs" / "version_0"
    runs = [path.name for path in (folder / "runs").glob("[!.]*") if path.is_dir()]
    assert runs == ["version_0"]
    assert files(theirs) == files(ours)
    for name in ("metrics.csv", *(n for n in files(ours) if n.endswith((".jsonl", "tensors")))):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes(), name
    assert curves(theirs) == curves(ours)
    assert_same(last_checkpoint(theirs), last_checkpoint(ours), "checkpoint")


def files(run: Path) -> list[str]:
    """What a run folder holds; the names of event files hold the time."""
    kept = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return sorted(str(path) for path in kept if "tfevents" not in path.name)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(run)).Reload()
    tags = board.Tags()
    found = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["histograms"]:
        found[tag] = [(e.step, e.histogram_value.sum) for e in board.Histograms(tag)]
    return found


def last_checkpoint(run: Path) -> dict[str, Any]:
    path = max((run / "checkpoints").glob("*.ckpt"))
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    del checkpoint["run"]["logs"]["BoardLogger"]  # names of event files
    return checkpoint


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Compares nested containers, tensors bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def whole(runner: Any, make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    config = configuration(make_config)
    return Whole(tmp_path_factory.mktemp("runs"), runner, config)


def test_killed_five_times_it_ends_the_same(whole: Whole) -> None:
    draw = random.Random(0)
    moments = [{"calls": draw.randrange(whole.calls)} for _ in range(5)]
    whole.check(whole.interrupted("five", moments))


@pytest.mark.parametrize(
    "place",
    [
        "UnlearningMixin._unlearn",
        pytest.param("EvaluationMixin._count", marks=pytest.mark.slow),
    ],
)
def test_sigterm_saves_after_the_step_and_leaves(place: str, whole: Whole) -> None:
    folder = whole.folder / place
    moment = {"function": place, "count": 3, "number": signal.SIGTERM}
    status, _ = whole.runner.run(folder, RESUME, **moment)
    log = (folder / "log").read_text()
    assert status == 128 + signal.SIGTERM, log
    assert "SIGTERM: leaving after saving runs/version_0/checkpoints/step-0000" in log
    assert "Traceback" not in log
    whole.check(whole.interrupted(place, []))


SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit", "SLURM_PROCID": "0"},
    **{"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"},
}


def test_a_job_that_slurm_requeues_goes_on_by_itself(whole: Whole) -> None:
    folder = whole.folder / "slurm"
    folder.mkdir()
    scontrol = folder / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > requeued\nkill -9 $PPID\n')
    scontrol.chmod(0o755)
    env = SLURM | {"PATH": f"{folder}:{os.environ['PATH']}"}
    moment = {"function": "UnlearningMixin._unlearn", "count": 2, "number": signal.SIGUSR1}
    status, _ = whole.runner.run(folder, FIT, env=env, **moment)
    assert status == -signal.SIGKILL, (folder / "log").read_text()
    assert (folder / "requeued").read_text() == "requeue 7\n"
    assert (folder / "runs" / "hpc_ckpt_1.ckpt").exists()
    status, _ = whole.runner.run(folder, FIT, env=env | {"SLURM_RESTART_COUNT": "1"})
    assert status == 0, (folder / "log").read_text()
    assert "The run in runs/version_0 goes on from hpc_ckpt_1.ckpt" in (folder / "log").read_text()
    whole.check(folder)


PHASES = {  # a call within each, the second or later where there are several
    "elicitation": ("generate_answers", 1),
    "probe": ("labelled_tokens", 2),
    "Fisher": ("diagonal_fisher", 1),
    "scoring": ("forgetting_confidence", 1),
    "selection": ("select_forget_set", 1),
    "between micro-batches": ("LightningModule.manual_backward", 5),
    "unlearning": ("UnlearningMixin._unlearn", 2),
    "validation": ("EvaluationMixin._count", 4),
    "a row of the table": ("_TableWriter.save", 9),
    "a new column": ("_TableWriter._write", 1),
    "the begin of a checkpoint": ("WholeCheckpointIO.save_checkpoint", 2),
    "the middle of a checkpoint": ("_SummedFile.write", 100),
    "the end of a checkpoint": ("_to_disk", 20),
    "the removal of a checkpoint": ("TorchCheckpointIO.remove_checkpoint", 1),
    "the end of training": ("StepCheckpoint.on_train_end", 1),
    "the export": ("export_model", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["probe", "online"])
def test_killed_in_each_phase_it_ends_the_same(
    anchor: str, runner: Any, make_config: Make, tmp_path: Path
) -> None:
    config = configuration(make_config, tokens_per_pass=24)
    if anchor == "probe":
        options = {"anchor": "probe", "probe_steps": 3, "fisher_texts": 5, "batch_size": 4}
        config["trainer"]["callbacks"][0]["init_args"] = options
    whole = Whole(tmp_path, runner, config)
    for phase, (function, count) in PHASES.items():
        if phase == "probe" and anchor == "online":
            continue
        folder = tmp_path / phase
        status, _ = runner.run(folder, RESUME, function=function, count=count)
        assert status == -signal.SIGKILL, (phase, (folder / "log").read_text())
        whole.check(whole.interrupted(phase, []))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_six_times_it_ends_the_same(seed: int, whole: Whole) -> None:
    draw = random.Random(f"six {seed}")
    moments = [{"calls": draw.randrange(whole.calls)} for _ in range(6)]
    whole.check(whole.interrupted(f"six-{seed}", moments))


@pytest.mark.slow
def test_killed_after_any_time_it_ends_the_same(whole: Whole) -> None:
    begun = time.monotonic()
    assert whole.runner.run(whole.folder / "timed", FIT)[0] == 0
    took = time.monotonic() - begun
    draw = random.Random(1)
    for run in range(4):
        moments = [{"seconds": draw.uniform(0.01, took)} for _ in range(5)]
        whole.check(whole.interrupted(f"timed-{run}", moments))


@pytest.mark.slow
def test_a_guarded_run_that_is_killed_ends_the_same(
    runner: Any, make_config: Make, tmp_path: Path
) -> None:
    config = configuration(make_config, unlearning_scale=30.0, unlearning_interval=1)
    guard = {"class_path": "lwf_lightning.callbacks.AscentGuard"}
    config["trainer"]["callbacks"].insert(1, guard)
    whole = Whole(tmp_path, runner, config)
    assert "undo and damp" in (tmp_path / "whole" / "log").read_text()
    draw = random.Random(5)
    moments = [{"calls": draw.randrange(whole.calls // 3, whole.calls)} for _ in range(4)]
    whole.check(whole.interrupted("guarded", moments))


TOLD_ALONE = """
import os, signal, sys
from lwf_lightning.cli import main
from lwf_lightning.module import LWFModule

unlearn = LWFModule._unlearn

def told(self):
    if (os.environ["RANK"], self.trainer.global_step, sys.argv[1]) == ("1", 4, "told"):
        os.kill(os.getpid(), signal.SIGTERM)
    unlearn(self)

LWFModule._unlearn = told
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_sigterm_to_one_of_two_processes_stops_both_after_the_step(
    make_config: Make, tmp_path: Path
) -> None:
    config = configuration(make_config)
    config["trainer"] |= {"strategy": "ddp", "devices": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "script.py").write_text(TOLD_ALONE)

    def run(name: str, *args: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return subprocess.run(
            [sys.executable, *launch, "../script.py", *args],
            cwd=tmp_path / name,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(killable.SOURCE)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    done = run("whole", "left alone", *FIT)
    assert done.returncode == 0, done.stderr
    done = run("cut", "told", *FIT)
    assert done.returncode != 0
    assert (
        "SIGTERM: leaving after saving runs/version_0/checkpoints/step-000005.ckpt" in done.stderr
    )
    done = run("cut", "left alone", *RESUME)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "cut", tmp_path / "whole")
