"""A Trainer with three more entry points: elicit, score and estimate."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import Strategy

from lwf_lightning.callbacks.checkpoint import StepCheckpoint
from lwf_lightning.callbacks.fisher import FisherCallback
from lwf_lightning.callbacks.guard import AscentGuard
from lwf_lightning.callbacks.progress import PhaseProgressBar
from lwf_lightning.checkpoint_io import WholeCheckpointIO
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.distributed import (
    check_precision_flag,
    check_strategy,
    check_strategy_flag,
)
from lwf_lightning.files import require_free
from lwf_lightning.forgetting.elicit import SelfKnowledge
from lwf_lightning.forgetting.report import score_rows, write_jsonl
from lwf_lightning.fsdp2 import load_checkpoint_weights
from lwf_lightning.loggers import BoardLogger, TableLogger
from lwf_lightning.models import export_model
from lwf_lightning.module import LWFModule
from lwf_lightning.results_table import print_results
from lwf_lightning.resumption import CheckpointConnector, SignalConnector, StepLoop
from lwf_lightning.runs import require_checkpoint
from lwf_lightning.trainer_checks import check_flags


class _Elicit(L.Callback):
    """Stops a fit before its first step, once the self-knowledge is known."""

    chooses_forget_set = True  # nothing is unlearned, so nothing has to be chosen

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


class _Score(L.Callback):
    """Stops a fit before its first step, after one refresh of the FisherCallback."""

    has_scored = False  # a checkpoint brings scores of its own

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _fisher_callback(trainer).refresh(trainer, pl_module)
        self.has_scored = True
        trainer.should_stop = True


class LWFTrainer(L.Trainer):
    """Lightning's Trainer; ``elicit`` and ``score`` write what the model knows as JSONL.

    ``ckpt_path="last"`` goes on with the newest run of this configuration under
    ``default_root_dir``, in its own folder and exactly as if nothing had happened, or begins one.
    In ``validate``, ``test`` and ``predict`` it takes that run's last checkpoint.

    Args:
        *args: See Lightning's Trainer.
        logger: True for TensorBoard and a CSV file, side by side in the run folder (none
            in ``barebones``); False for none; or loggers of your own, which write where they see
            fit.
        callbacks: See Lightning's Trainer. A
            :class:`~lwf_lightning.callbacks.StepCheckpoint` is added unless there is one, or
            ``enable_checkpointing`` is False.
        enable_progress_bar: Whether to show progress: with the phase, unless ``callbacks`` holds
            a progress bar of your own.
        ascent_guard: Whether to add an AscentGuard, unless ``callbacks`` holds one.
        default_root_dir: Folder of this experiment's runs, ``version_<n>``.
        strategy: ``auto``, ``ddp``, or ModelParallelStrategy for FSDP2; see docs/multi-gpu.md.
        use_distributed_sampler: Stays off: the datamodule shares out the texts itself.
        **kwargs: See Lightning's Trainer.

    Attributes:
        run_folder: The folder of the run, whatever the loggers: a new one, or that of the run that
            goes on.
        trains: Whether a fit is one: ``elicit`` and ``score`` borrow it, and take no step.
    """

    trains = True

    def __init__(
        self,
        *args: Any,
        logger: Logger | Iterable[Logger] | bool | None = True,
        callbacks: list[L.Callback] | L.Callback | None = None,
        enable_progress_bar: bool | None = None,
        ascent_guard: bool = True,
        default_root_dir: str | Path = "runs",
        strategy: str | Strategy = "auto",
        use_distributed_sampler: bool = False,
        **kwargs: Any,
    ) -> None:
        sizes = [kwargs.get(name) for name in ("devices", "num_nodes")]
        check_strategy_flag(strategy, prod(size for size in sizes if isinstance(size, int)))
        check_precision_flag(kwargs.get("precision"))
        check_flags(kwargs)
        if kwargs.get("barebones"):  # nothing is added; Lightning refuses what is asked for
            logger = False if logger is None or logger is True else logger
            enable_progress_bar = bool(enable_progress_bar)
        if "://" in str(default_root_dir):
            raise ValueError(
                f"trainer.default_root_dir: {default_root_dir} is no local folder: give one, and "
                "copy it there; runs are locked and written in place"
            )
        default_root_dir = Path(default_root_dir).expanduser()
        board = BoardLogger(default_root_dir)
        self.run_folder = Path(board.log_dir)
        if logger is None or logger is True:
            # Two loggers share a folder on purpose; the CSV one would warn that it is not empty.
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            # It means optimizers stepped since the save; here a save comes after its step.
            warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optim")
            logger = [board, TableLogger(default_root_dir, version=f"version_{board.version}")]
        # What is logged at the end of an epoch is the same on every rank already.
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        callbacks = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks or [])
        if enable_progress_bar is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(PhaseProgressBar())
        without_checkpoints = kwargs.get("enable_checkpointing") is False
        if not any((without_checkpoints, kwargs.get("fast_dev_run"), kwargs.get("barebones"))) and (
            not any(isinstance(callback, StepCheckpoint) for callback in callbacks)
        ):
            callbacks.append(StepCheckpoint())
        if ascent_guard and not any(isinstance(callback, AscentGuard) for callback in callbacks):
            callbacks.append(AscentGuard())
        super().__init__(
            *args,
            logger=logger,
            callbacks=callbacks,
            enable_progress_bar=enable_progress_bar,
            default_root_dir=default_root_dir,
            strategy=strategy,
            use_distributed_sampler=use_distributed_sampler,
            **kwargs,
        )
        check_strategy(self)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's own
            self.strategy.checkpoint_io = WholeCheckpointIO()
        loop = self.fit_loop.epoch_loop
        self.fit_loop.epoch_loop = StepLoop(self, loop.min_steps, loop.max_steps)
        for evaluation in (self.validate_loop, self.test_loop):
            evaluation._print_results = print_results  # type: ignore[method-assign]
        self._checkpoint_connector: CheckpointConnector = CheckpointConnector(self)
        self._signal_connector: SignalConnector = SignalConnector(self)

    def _teardown(self) -> None:
        """Ends what a fit, an evaluation or their failure leaves; Lightning calls it after each."""
        try:
            super()._teardown()
        finally:
            self._checkpoint_connector.let_go()

    @property
    def log_dir(self) -> str | None:
        """The first process's ``run_folder``, to be asked for on all; None in ``fast_dev_run``."""
        if self.fast_dev_run:  # type: ignore[attr-defined]
            return None
        return str(self.strategy.broadcast(str(self.run_folder)))

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """Lightning takes ``best`` from the first; StepCheckpoint knows only the last."""
        return sorted(super().checkpoint_callbacks, key=lambda c: isinstance(c, StepCheckpoint))

    def elicit(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str = "self_knowledge.jsonl",
    ) -> None:
        """Let the base model answer the forgetting prompts, and write its answers as JSONL.

        Args:
            model: The module.
            datamodule: The datamodule.
            ckpt_path: Not needed: the answers are the base model's.
            weights_only: Whether a checkpoint may hold tensors and primitives only.
            output: Path of the JSONL file: task, row, prompt, answer.
        """
        _check_output(output)
        knowledge = self._stop_early(_Elicit(), model, datamodule, ckpt_path, weights_only)
        if not self.is_global_zero:
            return
        write_jsonl(
            output,
            (
                {"task": t.task, "row": t.row, "prompt": t.prompt, "answer": t.answer}
                for t in knowledge.texts
            ),
        )
        print(f"{len(knowledge.texts)} texts ({knowledge.dropped} empty ones dropped): {output}")  # noqa: T201

    def score(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str = "scores.jsonl",
    ) -> None:
        """Score the self-knowledge by forgetting confidence, and write it as JSONL.

        Args:
            model: The module.
            datamodule: The datamodule.
            ckpt_path: A checkpoint whose weights are the anchor, with anchor ``online``.
            weights_only: Whether a checkpoint may hold tensors and primitives only.
            output: Path of the JSONL file, highest confidence first: task, row, prompt, answer,
                alignment, sensitivity, confidence, selected.
        """
        _check_output(output)
        callback, stop = _fisher_callback(self), _Score()
        saves, callback.save_tensors = callback.save_tensors, False
        try:
            knowledge = self._stop_early(stop, model, datamodule, ckpt_path, weights_only)
        finally:
            callback.save_tensors = saves
        if not stop.has_scored or callback.scores is None or callback.forget_set is None:
            raise ValueError("nothing was scored: trainer.limit_train_batches leaves no batch")
        if not self.is_global_zero:
            return
        write_jsonl(output, score_rows(knowledge.texts, callback.scores, callback.forget_set))
        print(  # noqa: T201
            f"{len(knowledge.texts)} texts scored, {len(callback.forget_set)} selected "
            f"(alpha {callback.scores.alpha:.3g}): {Path(output)}"
        )

    def estimate(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        ranks: int | None = None,
    ) -> None:
        """Predict the memory of a fit, phase by phase, without loading the model.

        The model's configuration and its tokenizer are read, and the texts for their lengths.

        Args:
            model: The module.
            datamodule: The datamodule.
            ckpt_path: Not needed: taken so that a fit's configuration file is.
            weights_only: Not needed either.
            ranks: Processes to plan for, sharded by FSDP2, whether or not this machine has them;
                by default the trainer's own.
        """
        from rich.console import Console

        from lwf_lightning.estimate import available, predict
        from lwf_lightning.memory_report import table, verdict

        if not isinstance(model, LWFModule) or not isinstance(datamodule, LWFDataModule):
            raise ValueError("estimate needs an LWFModule and an LWFDataModule")
        if ranks is not None and ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        found = predict(self, model, datamodule, ranks)
        console = Console()
        console.print(table(found))
        for line in verdict(found, available(self)):
            console.print(line, highlight=False)

    def export(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str = "model",
        merge: bool = True,
    ) -> None:
        """Write the model of a checkpoint, sharded or not, as transformers and peft load it.

        Args:
            model: The module.
            datamodule: Needed for ``last`` only.
            ckpt_path: The checkpoint, a file or a sharded one's folder; ``last`` for that of the
                newest run of this configuration.
            weights_only: Not needed: nothing but tensors and primitives is ever read.
            output: Folder to write, absent or empty; with LoRA it holds ``adapter`` and ``merged``.
            merge: Whether to write the merged model beside a LoRA adapter.
        """
        if not isinstance(model, LWFModule):
            raise ValueError("export needs an LWFModule")
        if ckpt_path is None:
            raise ValueError("export needs --ckpt_path: a checkpoint file or folder, or last")
        require_free(Path(output))
        if ckpt_path == "last":
            ckpt_path = str(self._checkpoint_connector.last_checkpoint(model, datamodule))
        require_checkpoint(ckpt_path)
        whole = model.load_whole_model()
        load_checkpoint_weights(whole, ckpt_path)
        export_model(whole, model.tokenizer, output, merge=merge)
        print(f"Exported {ckpt_path}: {output}")  # noqa: T201

    def _stop_early(
        self,
        stop: L.Callback,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None,
        ckpt_path: str | None,
        weights_only: bool | None,
    ) -> SelfKnowledge:
        if not isinstance(model, LWFModule) or not isinstance(datamodule, LWFDataModule):
            raise ValueError("this subcommand needs an LWFModule and an LWFDataModule")
        if not model.schedule.unlearns:
            raise ValueError(
                "model.init_args.schedule is 'never': there is nothing to elicit or to score"
            )
        if ckpt_path == "last":  # looked up while all callbacks are there
            ckpt_path = str(self._checkpoint_connector.last_checkpoint(model, datamodule))
        names = ("callbacks", "loggers", "num_sanity_val_steps", "limit_val_batches")
        own = {name: getattr(self, name) for name in (*names, "fit_loop", "run_folder", "trains")}
        # Nothing is trained or validated, so nothing may be logged, saved or exported either.
        kept = (FisherCallback, ProgressBar) if isinstance(stop, _Score) else ProgressBar
        self.callbacks: list[L.Callback] = [
            *(c for c in self.callbacks if isinstance(c, kept)),
            stop,
        ]
        self.loggers = []
        self.num_sanity_val_steps = 0
        self.limit_val_batches = 0
        # A run that its limits have ended would not be begun at all, so this has none.
        self.fit_loop = _FitLoop(self, min_epochs=0, max_epochs=-1)
        self.fit_loop.epoch_loop = StepLoop(self, max_steps=sys.maxsize)
        self.trains = False
        try:
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only)
        finally:  # the trainer is as it was for a fit that comes later
            for name, value in own.items():
                setattr(self, name, value)
        if datamodule.self_knowledge is None:
            raise ValueError("the run stopped before anything was elicited")
        return datamodule.self_knowledge


def _check_output(output: str) -> None:
    """Raises ``ValueError``, before any work, if no file can be written there."""
    if Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it")
    Path(output).parent.mkdir(parents=True, exist_ok=True)


def _fisher_callback(trainer: L.Trainer) -> FisherCallback:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FisherCallback):
            return callback
    raise ValueError("score needs lwf_lightning.FisherCallback among trainer.callbacks")
