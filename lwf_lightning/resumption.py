"""Where LWFTrainer differs from Lightning's Trainer so that an interrupted run goes on exactly.

Lightning saves on a signal, or in ``on_train_batch_end``, with a step half done. Here everything
is saved between two steps: when all of a step is logged and validated, before the next batch is
drawn.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lwf_lightning.callbacks.checkpoint import StepCheckpoint, time_is_up
from lwf_lightning.checkpoint_io import check_loads
from lwf_lightning.data.sampler import ResumableLoader
from lwf_lightning.loggers import BoardLogger, TableLogger
from lwf_lightning.runs import (
    begin_run,
    claim,
    configuration,
    is_new,
    is_run,
    is_whole,
    last_whole_checkpoint,
    require_checkpoint,
    run_state,
    runs_of,
)
from lwf_lightning.step_state import StepStateMixin

if TYPE_CHECKING:
    from lightning.pytorch.loops.fetchers import _DataFetcher


@dataclass(frozen=True)
class _Position:
    """Where an epoch's counters and the loader are."""

    batches: dict[str, Any]
    optimizer_steps: int  # begun by learning
    loader: ResumableLoader
    loader_state: dict[str, int]

    def has_learned_since(self, begun: _Position) -> bool:
        processed = self.batches["total"]["processed"] > begun.batches["total"]["processed"]
        return processed or self.optimizer_steps > begun.optimizer_steps


class StepLoop(_TrainingEpochLoop):
    """Lightning's loop over batches, with a moment between two steps."""

    restarting: bool
    _between_steps = False
    _begun: _Position | None = None  # where the step under way began

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Takes the steps of an epoch; where time is up within it, saves before it is ended."""
        super().run(data_fetcher)
        saver = step_checkpoint(self.trainer)
        if saver is not None and not self._is_training_done and time_is_up(self.trainer):
            self._between_steps = True
            saver.save(self.trainer)
            self._between_steps = False

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Saves or leaves if that is due, then takes the next step."""
        if self.restarting and self._between_steps:
            self.restarting = False  # nothing of the step before is left to be done
        elif not self.restarting:
            self._between_steps = True
            self._pause()
        self._between_steps = False
        # Lightning repeats what a step logged in the rows of the steps after it; a resumed run
        # could not know it.
        for name in [name for name, result in self._results.items() if not result.meta.on_epoch]:
            del self._results[name]
        self._begun = self._position()
        try:
            super().advance(data_fetcher)
        except StopIteration:  # which ends the epoch; any other leaves a step that is not done
            self._begun = None
            raise
        self._begun = None

    def forget_step(self) -> None:
        """Leaves a step that has been cut off at that."""
        self._begun = None

    @contextmanager
    def before_the_step(self) -> Iterator[None]:
        """Within the block a step is as if it had not begun, unless it has taken its learning step.

        A checkpoint that is saved there has the step's batch handed out again. What has been
        unlearned before that step is known to the module, and stays done.
        """
        begun, now = self._begun, self._position()
        # Another module's steps may move the weights before an optimizer's step is counted.
        is_ours = isinstance(self.trainer.lightning_module, StepStateMixin)
        if begun is None or now is None or not is_ours or now.has_learned_since(begun):
            yield
            return
        self._go_to(begun)
        self._between_steps = True
        try:
            yield
        finally:
            self._between_steps = False
            self._go_to(now)

    def _position(self) -> _Position | None:
        loader: Any = self.trainer.train_dataloader
        if not isinstance(loader, ResumableLoader):  # one that cannot be set back
            return None
        steps = self.manual_optimization.optim_step_progress.total.ready
        return _Position(self.batch_progress.state_dict(), steps, loader, loader.state_dict())

    def _go_to(self, position: _Position) -> None:
        self.batch_progress.load_state_dict(position.batches)
        position.loader.load_state_dict(position.loader_state)

    def _pause(self) -> None:
        trainer: Any = self.trainer
        saver = step_checkpoint(trainer)
        if saver is not None:
            saver.between_steps(trainer)
        signals: SignalConnector = trainer._signal_connector
        signals.act()

    def _broadcast_sigterm_tensor(self) -> None:
        """Lightning asks here whether to leave with a step half done; ``_pause`` has asked."""

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Adds whether the checkpoint is one between two steps."""
        return {**super().on_save_checkpoint(), "between_steps": self._between_steps}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Takes the state back."""
        super().on_load_checkpoint(state_dict)
        self._between_steps = state_dict.get("between_steps", False)


class SignalConnector(_SignalConnector):
    """Lightning's answers to signals, put off until the step is done.

    SIGTERM saves and leaves; SLURM's signal saves, has the job requeued and goes on. Where nothing
    is trained, SIGTERM leaves at once.
    """

    _terminate = False
    _requeue: tuple[Any, Any] | None = None

    def register_signal_handlers(self) -> None:
        """See Lightning's."""
        self._requeue = None
        super().register_signal_handlers()
        self._leave_unless_training()  # when told after the last step of a fit

    def _sigterm_notifier_fn(self, signum: Any, frame: FrameType) -> None:
        # Lightning's would talk to the other processes here, in the middle of whatever they do,
        # and raise in its loops before the step is done.
        launcher = self.trainer.strategy.launcher
        if not self._terminate and launcher is not None:
            launcher.kill(signum)
        self._terminate = True
        self._leave_unless_training()

    def _leave_unless_training(self) -> None:
        trainer: Any = self.trainer
        if self._terminate and not (trainer.trains and trainer.state.fn == TrainerFn.FITTING):
            self._leave("SIGTERM: leaving")

    def _leave(self, message: str) -> NoReturn:
        self._terminate = False
        rank_zero_info(message)
        sys.exit(128 + signal.SIGTERM)

    def _slurm_sigusr_handler_fn(self, signum: Any, frame: FrameType) -> None:
        self._requeue = (signum, frame)

    def act(self) -> None:
        """Does between two steps what a signal asked for, on all processes alike."""
        trainer: Any = self.trainer
        asked = trainer.strategy.reduce_boolean_decision
        if not asked(self._terminate or self._requeue is not None, all=False):
            return
        if asked(self._requeue is not None, all=False):
            super()._slurm_sigusr_handler_fn(*(self._requeue or (signal.SIGUSR1, None)))
            self._requeue = None
        if asked(self._terminate, all=False):
            saver = step_checkpoint(trainer)
            saved = "" if saver is None else f" after saving {saver.save(trainer)}"
            self._leave(f"SIGTERM: leaving{saved}; --ckpt_path last goes on from there")


class CheckpointConnector(_CheckpointConnector):
    """Lightning's choice of a checkpoint, in which ``last`` means the newest run of this kind."""

    _own: Path | None = None  # the folder of the run that this trainer has begun, or goes on with
    _claim: TextIO | None = None  # held while it does
    _ignores_slurm = False

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Loads tensors and primitives only, whatever the strategy."""
        if weights_only is False:
            raise ValueError(
                f"weights_only=False would run whatever code is in {checkpoint_path}: leave it "
                "out; checkpoints of this package need none"
            )
        super().resume_start(checkpoint_path, weights_only=True)

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Refuses at once to save what no run could go on with."""
        loop: Any = self.trainer.fit_loop.epoch_loop
        with loop.before_the_step():
            checkpoint: dict[str, Any] = super().dump_checkpoint(weights_only)
        check_loads(checkpoint)
        return checkpoint

    def _select_ckpt_path(
        self,
        state_fn: TrainerFn,
        ckpt_path: Any,
        model_provided: bool,
        model_connected: bool,
    ) -> Any:
        path = super()._select_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)
        self._ckpt_path = path  # for the callbacks' setup; Lightning sets it after that
        trainer: Any = self.trainer
        if path is not None:
            require_checkpoint(path)
        elif state_fn != TrainerFn.FITTING and not hasattr(trainer.lightning_module, "model"):
            rank_zero_info(
                "These are the weights of the base model; --ckpt_path last takes those of the "
                "newest run of this configuration"
            )
        if state_fn == TrainerFn.FITTING:
            trainer.fit_loop.epoch_loop.forget_step()  # of a fit before this one that was cut off
        saves = state_fn == TrainerFn.FITTING and step_checkpoint(trainer) is not None
        for part in (trainer.lightning_module, trainer.datamodule):
            if saves and part is not None:
                check_loads({part.CHECKPOINT_HYPER_PARAMS_KEY: dict(part.hparams)})
        if trainer.is_global_zero:
            root = trainer.default_root_dir
            # Another trainer's run may have begun there since this one was made, or begin now.
            if not saves and trainer.run_folder != self._own:
                own = [logger for logger in trainer.loggers if _is_own(logger)]
                writes = bool(own) or state_fn == TrainerFn.PREDICTING
                writes = writes and not (trainer.fast_dev_run or trainer.barebones)
                # What a user has logged already lies there.
                writes = writes and not any(logger._experiment is not None for logger in own)
                while is_run(trainer.run_folder) or (writes and not is_new(trainer.run_folder)):
                    self._write_to(Path(BoardLogger(root).log_dir), {})
                self._own = trainer.run_folder if writes else None
            if saves:
                # Before anything else is there, so that a run is known from its first moment.
                values = self._configuration()
                while not begin_run(
                    trainer.run_folder, values, is_own=trainer.run_folder == self._own
                ):
                    self._write_to(Path(BoardLogger(root).log_dir), {})
                self._own = trainer.run_folder
                self._hold(trainer.run_folder)
        return path

    def _hold(self, run: Path) -> None:
        """Has this process be the only one that goes on with a run, until :meth:`let_go`."""
        if not self.trainer.is_global_zero:
            return
        launcher: Any = self.trainer.strategy.launcher
        try:
            claimed = claim(run)
        except ValueError:
            if hasattr(launcher, "kill"):  # the others would wait for this one
                launcher.kill(signal.SIGTERM)
            raise
        if claimed is not None:
            self.let_go()  # of a run that a failure has left
            self._claim = claimed

    def let_go(self) -> None:
        """Lets other processes go on with the run."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _parse_ckpt_path(
        self,
        state_fn: TrainerFn,
        ckpt_path: Any,
        model_provided: bool,
        model_connected: bool,
    ) -> Any:
        if ckpt_path == "last":
            return self._last(state_fn)
        trainer: Any = self.trainer
        saver = trainer.checkpoint_callback
        if ckpt_path == "best" and not getattr(saver, "best_model_path", ""):
            raise ValueError(
                "--ckpt_path best: no ModelCheckpoint of this trainer has chosen one; give a file, "
                "or last"
            )
        trains = state_fn == TrainerFn.FITTING and trainer.trains  # it may but elicit or score
        if ckpt_path is None and trains and _is_requeued():
            ckpt_path = self._last(state_fn)
        # Lightning would take what any run has left, at a signal of SLURM's or an exception.
        if ckpt_path is None and model_provided:
            return None
        self._ignores_slurm = True
        try:
            return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)
        finally:
            self._ignores_slurm = False

    @property
    def _hpc_resume_path(self) -> str | None:
        return None if self._ignores_slurm else super()._hpc_resume_path

    def _last(self, state_fn: TrainerFn) -> Path | None:
        trainer: Any = self.trainer
        if state_fn != TrainerFn.FITTING:
            return self.last_checkpoint(trainer.lightning_module, trainer.datamodule)
        root = Path(trainer.default_root_dir)
        run = next(iter(runs_of(root, self._configuration())), None)
        path = None if run is None else self._newest_of(run)
        saves = step_checkpoint(trainer) is not None  # else there is no run of its own to go on
        if run is None or (path is None and not saves):
            what = "run" if run is None else "checkpoint of a run"
            rank_zero_warn(
                f"--ckpt_path last: there is no {what} of this configuration in {root}: one begins"
            )
        elif saves:
            self._hold(run)
            self._own = run
            self._write_to(run, {} if path is None else run_state(path)["logs"])
            where = "from the beginning" if path is None else f"from {path.name}"
            rank_zero_info(f"The run in {run} goes on {where}")
        return path

    def last_checkpoint(self, module: Any, datamodule: Any) -> Path:
        """The last checkpoint of the newest run of a configuration that has one, to be looked at.

        Raises:
            ValueError: If there is none.
        """
        trainer: Any = self.trainer
        root = Path(trainer.default_root_dir)
        runs = runs_of(root, configuration(trainer, module, datamodule))
        for run in runs:
            if (path := self._newest_of(run)) is not None:
                return path
            rank_zero_warn(f"{run} was interrupted before its first checkpoint: it is passed over")
        what = "no checkpoint of a run" if runs else "no run"
        raise ValueError(f"--ckpt_path last: {root} has {what} of this configuration")

    def _write_to(self, folder: Path, logs: Mapping[str, Any]) -> None:
        trainer: Any = self.trainer
        trainer.run_folder = folder
        for logger in trainer.loggers:
            if _is_own(logger):
                logger.continue_run(folder, logs.get(type(logger).__name__, {}))

    def _configuration(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        return configuration(trainer, trainer.lightning_module, trainer.datamodule)

    def _newest_of(self, run: Path) -> Path | None:
        path = last_whole_checkpoint(run)
        if (requeued := self._hpc_resume_path) is not None:
            of_slurm = Path(requeued)
            state = run_state(of_slurm) if is_whole(of_slurm) else {}
            step = -1 if path is None else run_state(path)["step"]
            if state.get("folder") == str(run) and state["step"] > step:
                return of_slurm
        return path


def _is_own(logger: Any) -> bool:
    return isinstance(logger, (BoardLogger, TableLogger))


def _is_requeued() -> bool:
    """Whether SLURM has started this job again, as it does after the signal before its limit."""
    return SLURMEnvironment.detect() and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def step_checkpoint(trainer: Any) -> StepCheckpoint | None:
    """The trainer's StepCheckpoint; None if it has none, or saves nothing."""
    for callback in trainer.callbacks:
        if isinstance(callback, StepCheckpoint) and not trainer.fast_dev_run:
            return callback
    return None
