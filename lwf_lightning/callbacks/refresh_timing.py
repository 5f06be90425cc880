"""When FisherCallback refreshes by itself."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lwf_lightning.module import LWFModule
from lwf_lightning.run_length import learning_steps


def warn_if_late(trainer: L.Trainer, pl_module: L.LightningModule, first: int) -> None:
    """Warns of a run that ends before it could forget anything.

    Args:
        trainer: Knows how long the run is.
        pl_module: The module that is to forget.
        first: The learning step before which the first refresh comes.
    """
    steps = learning_steps(trainer)
    if not isinstance(pl_module, LWFModule) and not pl_module.automatic_optimization:
        # How many steps its optimizers take for a batch, nobody knows.
        steps = None if trainer.max_steps == -1 else trainer.max_steps
    if steps is None:
        return
    if isinstance(pl_module, LWFModule):
        unlearns = pl_module.schedule.unlearns_between
        is_late = unlearns(0, steps) and not unlearns(first, steps)
    else:
        is_late = first >= steps
    if is_late:
        rank_zero_warn(
            f"nothing will be forgotten: with FisherCallback's refresh_interval {first} the "
            f"first texts are chosen before step {first} (counted from 0), and the run has "
            f"{steps} learning steps. Lower refresh_interval, or take anchor 'probe'"
        )
