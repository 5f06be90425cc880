"""What Lightning's trainer offers and an LWFModule cannot use: refused with what does it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

_INSTEAD = {  # Lightning's flag: its default, and what does the same here
    "accumulate_grad_batches": (1, "model.init_args.tokens_per_pass, which cuts a step's batch"),
    "gradient_clip_val": (None, "model.init_args.max_grad_norm"),
    "overfit_batches": (0, "data.init_args.learning_texts to as many texts as those batches hold"),
}
_FINDERS: dict[type[Any], str] = {
    LearningRateFinder: (
        "LearningRateFinder (Tuner.lr_find) cannot judge an LWFModule: its steps return no loss. "
        "Leave it out and set model.init_args.learning_rate; a study tries several, see "
        "docs/studies.md"
    ),
    BatchSizeFinder: (
        "BatchSizeFinder (Tuner.scale_batch_size) cannot judge an LWFModule: it trains before "
        "there is anything to unlearn, and misses the memory that takes. Leave it out: "
        "model.init_args.tokens_per_pass limits a step's memory whatever data.init_args.batch_size "
        "is, and python cli.py estimate predicts it"
    ),
}


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuses flags that would have no effect, or another one than they say.

    Args:
        given: Values of the trainer's flags by name; others are ignored.

    Raises:
        ValueError: Names the flag, and what to set instead.
    """
    for flag, (default, instead) in _INSTEAD.items():
        if given.get(flag) not in (None, default):
            raise ValueError(f"trainer.{flag} is of no use here: set {instead}")
    if given.get("check_val_every_n_epoch") == 0:  # Lightning would divide by it, after an epoch
        raise ValueError(
            "trainer.check_val_every_n_epoch must be at least 1; limit_val_batches 0 leaves "
            "validation out, and null has val_check_interval count steps instead of an epoch's"
        )


def check_trainer(trainer: L.Trainer) -> None:
    """Refuses the same of a trainer that is there, and Lightning's finders, before a fit.

    Raises:
        ValueError: Names the flag or the finder, and what to do instead.
    """
    check_flags({name: getattr(trainer, name) for name in _INSTEAD})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, message in _FINDERS.items():
            # One of your own may begin elsewhere, for instance in a test.
            if isinstance(callback, kind) and type(callback).on_fit_start is kind.on_fit_start:
                raise ValueError(message)
