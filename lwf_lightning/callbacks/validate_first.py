"""ValidateFirst: a validation before the first learning step."""

from __future__ import annotations

from typing import Any

import lightning as L


class ValidateFirst(L.Callback):
    """Validates before the first learning step, so that every curve starts at the base model.

    Lightning's sanity check does not log, and ``validate`` is a run of its own.
    """

    def __init__(self) -> None:
        self._has_validated = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts anew, before a checkpoint is restored."""
        if stage == "fit":
            self._has_validated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs the validation loop, unless the run is a resumed one."""
        if trainer.global_step > 0 or trainer.should_stop or self._has_validated:
            return
        self._has_validated = True
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def state_dict(self) -> dict[str, Any]:
        """Whether it is done: a run may be interrupted after it, and before its first step."""
        return {"has_validated": self._has_validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state back."""
        self._has_validated = state_dict["has_validated"]
