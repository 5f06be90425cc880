"""How long a run will be, and how often it validates, by its ``trainer`` configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def steps_of(settings: Mapping[str, Any], batches: int) -> int:
    """Learning steps, one per batch, as Lightning counts them.

    Args:
        settings: The ``trainer`` configuration.
        batches: Batches of an epoch.

    Raises:
        ValueError: If nothing ends the run.

    Example:
        >>> steps_of({"max_steps": 20, "max_epochs": 3}, batches=6)
        18
    """
    steps, epochs = settings["max_steps"], settings["max_epochs"]
    if epochs is None:
        epochs = 1000 if steps == -1 else -1  # Lightning's own limit
    limits = [limit for limit in (steps, epochs * batches) if limit >= 0]
    if not limits:
        raise ValueError(
            "trainer.max_epochs: -1 without trainer.max_steps never ends: give one of them"
        )
    return int(min(limits))


def validations_of(settings: Mapping[str, Any], batches: int, steps: int) -> int:
    """Validations while a run takes its steps.

    Args:
        settings: The ``trainer`` configuration.
        batches: Batches of an epoch.
        steps: Steps of the run.

    Example:
        >>> validations_of({"val_check_interval": 0.5, "check_val_every_n_epoch": 1}, 6, steps=16)
        5
    """
    interval = settings["val_check_interval"]
    if interval is None:
        interval = 1.0
    if isinstance(interval, float):  # a share of an epoch
        interval = max(1, int(batches * interval))
    every = settings["check_val_every_n_epoch"]
    if every is None:
        return int(steps // interval)
    whole, rest = divmod(steps, batches)
    begun = rest // interval if (whole + 1) % every == 0 else 0
    return int(whole // every * (batches // interval) + begun)
