"""Runs that are made twice: by one process, and by several that share its global batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lwf_lightning import AscentGuard, ExportCallback

Make = Callable[..., Any]
GLOBAL_BATCH, GLOBAL_FORGET_BATCH = 4, 4
FOLDER = "LWF_TEST_FOLDER"  # what the launching test and its ranks share

STEPS = 13  # two epochs and a step
FLOAT32 = ("probe",)  # of RUNS; the others are in float64, where rounding hides nothing
ONLY_DDP = ("a ceiling for some",)  # another like it, without what differs in shards
# What the runs ask of module, datamodule and callback.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "probe": {"module": {"tokens_per_pass": 8, "learning_rate": 5e-4}},
    "online, true Fisher, npo": {
        "module": {"objective": "npo", "schedule": "random"},
        "callback": {
            "anchor": "online",
            "refresh_interval": 5,
            "estimator": "true",
            "reduction": "sum",
            "fisher_texts": 24,
        },
    },
    "one text to forget": {
        "module": {
            "schedule": "front_loaded",
            "ahead_steps": 2,
            "learning_loss": "token_forgetting",
            "learning_loss_options": {"share_kept": 0.6, "weight_end": 0.2},
        },
        "callback": {"forgetting_rate": 0.01, "probe_batch_size": 1},
    },
    "fewer texts than ranks": {
        "module": {"regularizer": "ewc", "regularizer_options": {"strength": 1000.0}},
        "data": {"learning_texts": 1, "forgetting_prompts": 1, "eval_examples": 1},
    },
    "a ceiling for some": {
        "module": {
            "unlearning_ceiling": 3.75,
            "unlearning_interval": 2,
            "unlearning_retain": 0.5,
            "regularizer": "l2sp",
            "regularizer_options": {"strength": 1.0},
        },
    },
    "guarded, nothing to push on one rank": {
        "module": {
            "unlearning_scale": 300.0,
            "unlearning_ceiling": 1e9,
            "unlearning_interval": 1,
        },
        "data": {"forgetting_prompts": 1},
        "guard": {"damping": 0.03, "max_rise": 0.01, "max_spike": 10.0, "pause_steps": 3},
    },
    "replay, generated": {
        "module": {
            "objective": "replay",
            "gradient_checkpointing": True,
            "regularizer": "bss",
            "regularizer_options": {"strength": 0.1, "count": 2},
        },
        "data": {"evaluation": "generate"},
    },
}


def make_strategy(name: str, ranks: int) -> Strategy:
    """The strategy under test; it gives up on a rank that does not answer."""
    timeout = timedelta(seconds=60)
    if name == "fsdp2":
        return ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False, timeout=timeout)
    return DDPStrategy(timeout=timeout)


def guard_of(trainer: L.Trainer) -> AscentGuard:
    (guard,) = (c for c in trainer.callbacks if isinstance(c, AscentGuard))  # type: ignore[attr-defined]
    return guard


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., None]:
    """Runs suites of this folder on two processes; a rank that hangs is a failure."""

    def run(*suites: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
        kept |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
        options = ("-x", "-Wignore", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
        files = [str(Path(__file__).with_name(suite)) for suite in suites]
        done = subprocess.run(
            [sys.executable, "-m", *torchrun, "-m", "pytest", *options, *files],
            env=kept | {FOLDER: str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-3000:]

    return run


@pytest.fixture
def strategy() -> str:
    """What the suites of one strategy, or of both, say for themselves."""
    return "ddp"


@pytest.fixture
def runs(strategy: str) -> list[str]:
    return [name for name in RUNS if strategy == "ddp" or name not in ONLY_DDP]


@pytest.fixture
def shared_folder() -> Path:
    return Path(os.environ[FOLDER])


@pytest.fixture
def make_run(
    make_module: Make, make_data: Make, make_callback: Make, make_trainer: Make, strategy: str
) -> Callable[..., tuple[Any, ...]]:
    """Trainer, module, datamodule and callback of one of ``RUNS``."""

    def make(name: str, ranks: int, callbacks: Any = (), **trainer_options: Any) -> Any:
        options = RUNS[name]
        module = make_module(
            **{"learning_rate": 1e-3, "unlearning_scale": 0.5, **options.get("module", {})}
        )
        if name not in FLOAT32:
            load = module.load_whole_model
            module.load_whole_model = lambda: load().double()
        data = make_data(
            **{
                "batch_size": GLOBAL_BATCH // ranks,
                "forget_batch_size": GLOBAL_FORGET_BATCH // ranks,
                "eval_batch_size": 2,
                **options.get("data", {}),
            }
        )
        callback = make_callback(**options.get("callback", {}))
        callbacks = [AscentGuard(**options.get("guard", {})), *callbacks]
        if ranks > 1 or "RANK" in os.environ:
            trainer_options |= {"devices": ranks, "strategy": make_strategy(strategy, ranks)}
        defaults = {"max_steps": STEPS, "limit_val_batches": None, "val_check_interval": None}
        trainer = make_trainer(callbacks=[callback, *callbacks], **(defaults | trainer_options))
        return trainer, module, data, callback

    return make


@pytest.fixture
def results_of(make_run: Make, make_recorder: Make) -> Callable[..., dict[str, Any]]:
    """Makes one of ``RUNS`` and returns all that has to be equal."""

    def run(name: str, ranks: int, callbacks: Any = ()) -> dict[str, Any]:
        recorder = make_recorder()
        trainer, module, data, callback = make_run(name, ranks, [recorder, *callbacks])
        trainer.fit(module, data)
        fisher, anchor = callback.load_tensors()
        fitted = {key: float(value) for key, value in trainer.callback_metrics.items()}
        tested = trainer.test(module, data, verbose=False)[0]
        return {
            "texts": [(text.prompt, text.answer, text.row) for text in data.self_knowledge.texts],
            "forget_set": callback.forget_set,
            "fisher": fisher,
            "anchor": anchor,
            "scores": callback.state_dict()["scores"],
            "weights": recorder.weights,
            "counts": [trainer.global_step, module.unlearning_steps, module.skipped_steps],
            "guard": guard_of(trainer).state.records,
            "metrics": fitted | tested,
        }

    return run


@pytest.fixture
def write_files(make_run: Make) -> Callable[[int, Path], None]:
    """Runs what writes for others: elicit, score and ExportCallback."""

    def write(ranks: int, folder: Path) -> None:
        for command in ("elicit", "score"):
            trainer, module, data, _ = make_run("replay, generated", ranks)
            getattr(trainer, command)(module, data, output=str(folder / f"{command}.jsonl"))
        export = ExportCallback(str(folder / "exported"))
        trainer, module, data, _ = make_run("replay, generated", ranks, [export], max_steps=3)
        trainer.fit(module, data)

    return write


@pytest.fixture
def weights_after(
    make_run: Make, make_recorder: Make
) -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Makes a run that saves every 5 steps, perhaps from a checkpoint on; its weights."""

    def run(ranks: int, folder: Path, ckpt_path: Path | None = None) -> Any:
        saver = ModelCheckpoint(
            dirpath=folder, every_n_train_steps=5, save_top_k=-1, filename="{step}"
        )
        recorder = make_recorder()
        trainer, module, data, _ = make_run("a ceiling for some", ranks, [recorder, saver])
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return recorder.weights

    return run
