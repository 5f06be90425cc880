"""How long a run will be, as far as that is known before it begins."""

from __future__ import annotations

import lightning as L


def learning_steps(trainer: L.Trainer) -> int | None:
    """The learning steps of the whole run, with those before it was resumed.

    Returns:
        None where nobody can tell yet: without a limit, or with a limit of epochs whose loader has
        no length or is not there yet.
    """
    if trainer.max_epochs != -1 and trainer.train_dataloader is None:
        return None
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 <= steps < float("inf") else None
