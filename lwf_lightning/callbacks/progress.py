"""Lightning's progress bar, and what the run is doing."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class PhaseProgressBar(TQDMProgressBar):
    """The usual bar with a ``phase``: whether the last batch was learned or also unlearned."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """See TQDMProgressBar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        phase = getattr(pl_module, "phase", None)
        return metrics if phase is None else {**metrics, "phase": phase}
