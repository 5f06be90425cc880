"""ValidateFirst: a validation before the first learning step."""

from __future__ import annotations

import lightning as L


class ValidateFirst(L.Callback):
    """Validates before the first learning step, so that every curve starts at the base model.

    Lightning's sanity check does not log, and ``validate`` is a run of its own.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs the validation loop, unless the run is a resumed one."""
        if trainer.global_step > 0 or trainer.should_stop:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
