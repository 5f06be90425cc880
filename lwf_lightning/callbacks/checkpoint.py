"""StepCheckpoint: saves between two learning steps, so that a run can go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import tensor

from lwf_lightning.files import remove_leftovers
from lwf_lightning.loggers import BoardLogger, TableLogger
from lwf_lightning.runs import checkpoints, folder_of, is_checkpoint_name


class StepCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-<n>.ckpt`` in the run folder, for ``--ckpt_path last``.

    Lightning's ModelCheckpoint saves inside a step, before it is logged and validated. This one
    saves when all of a step is done and nothing of the next has begun, and notes where the logs
    were. :class:`~lwf_lightning.trainer.LWFTrainer` adds it by itself and tells it when; one of
    Lightning's may stand beside it, for instance to keep the best.

    Args:
        every_n_steps: Learning steps between two checkpoints. There is always one at the end,
            and one before the process leaves after a SIGTERM.
        keep: How many of the last checkpoints to keep; the one before the last serves should
            the last be damaged.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"StepCheckpoint's {name} must be at least 1, got {value}")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.best_model_path = ""
        """The last checkpoint: Lightning's name for what ``ckpt_path="best"`` loads."""
        self._folder = Path()
        self._saved_at = 0
        self._limits: list[Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds the run folder; warns where nobody will tell when a step is done."""
        if stage != "fit":
            return
        if not hasattr(trainer, "run_folder"):  # LWFTrainer's; it imports this module
            rank_zero_warn(
                f"StepCheckpoint will save at the end only, not every {self.every_n_steps} steps: "
                f"{type(trainer).__name__} does not tell it when a step is done. Take "
                "lwf_lightning.LWFTrainer, or "
                f"ModelCheckpoint(every_n_train_steps={self.every_n_steps}) beside it"
            )
        self._folder = folder_of(trainer) or Path()
        _check_names(trainer, self._folder / "checkpoints")
        self._saved_at = 0
        self._limits = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            remove_leftovers(self._folder)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Has a run that had ended stay so, unless its limits have changed.

        With a checkpoint of another run this one has only begun.
        """
        state = checkpoint["callbacks"].get(self.state_key, {})
        is_own = Path(str(trainer.ckpt_path)).parent.parent == self._folder
        if trainer.training and is_own and state.get("limits") == _limits(trainer):
            rank_zero_info(f"The run in {self._folder} has finished: nothing is left to do")
            trainer.should_stop = True

    def between_steps(self, trainer: L.Trainer) -> None:
        """Saves if it is time; the trainer calls this before each learning step."""
        step = trainer.global_step
        if step > self._saved_at and step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of the run; one whose time was up within an epoch is saved as it was."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not time_is_up(trainer):
            self._limits = _limits(trainer)
        elif self._saved_at == trainer.global_step:
            return
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> Path:
        """Saves, and removes what is no longer kept.

        Returns:
            The checkpoint.
        """
        step = trainer.global_step
        path = self._folder / "checkpoints" / f"step-{step:06d}.ckpt"
        self.best_model_path = str(path)
        trainer.save_checkpoint(path, weights_only=False)  # optimizers and counters, too
        self._saved_at = step
        if trainer.is_global_zero:
            # A later one was damaged when the run was resumed before it.
            earlier = [file for file in checkpoints(self._folder) if file.name <= path.name]
            for file in checkpoints(self._folder):
                if file not in earlier[: self.keep]:
                    trainer.strategy.remove_checkpoint(file)
        return path

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes where the logs are."""
        checkpoint["run"] = {
            "folder": str(self._folder),
            "step": trainer.global_step,
            "logs": {
                type(logger).__name__: logger.position()
                for logger in trainer.loggers
                if trainer.is_global_zero and isinstance(logger, (BoardLogger, TableLogger))
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The limits of the run, if it has ended."""
        return {"limits": self._limits}


def _check_names(trainer: L.Trainer, folder: Path) -> None:
    """Refuses a callback whose files would be taken for this one's, and removed."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is not None and Path(callback.dirpath).resolve() != folder.resolve():
            continue
        name = Path(callback.format_checkpoint_name({"epoch": tensor(0), "step": tensor(1)})).name
        if is_checkpoint_name(name):
            raise ValueError(
                f"ModelCheckpoint's filename {callback.filename!r} makes names such as {name}, "
                "those of StepCheckpoint: give it another filename"
            )


def time_is_up(trainer: Any) -> bool:
    """Whether ``trainer.max_time`` has run out for the first process, to be asked for on all."""
    left = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
    up = any(seconds is not None and seconds <= 0 for seconds in left)
    return bool(trainer.strategy.broadcast(up))


def _limits(trainer: L.Trainer) -> list[Any]:
    return [trainer.max_steps, trainer.max_epochs]
