"""How long a run will be, and how often it validates, by its ``trainer`` configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def batches_of_epoch(settings: Mapping[str, Any], batches: int) -> int:
    """Batches of an epoch, as ``limit_train_batches`` leaves them: a number, or a share.

    Args:
        settings: The ``trainer`` configuration.
        batches: What the datamodule's loader gives.

    Example:
        >>> batches_of_epoch({"limit_train_batches": 0.5}, 7), batches_of_epoch({}, 7)
        (3, 7)
    """
    limit = settings.get("limit_train_batches")
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


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
    interval, every = _interval_of(settings, batches), settings["check_val_every_n_epoch"]
    if every is None:
        return steps // interval
    whole, rest = divmod(steps, batches)
    begun = rest // interval if (whole + 1) % every == 0 else 0
    return int(whole // every * (batches // interval) + begun)


def last_validation_of(settings: Mapping[str, Any], batches: int, steps: int) -> int:
    """The learning steps that a run has taken when it validates last; 0 if it never does.

    Lightning adds no validation at the end of a run.

    Args:
        settings: The ``trainer`` configuration.
        batches: Batches of an epoch.
        steps: Steps of the run.

    Example:
        >>> last_validation_of({"val_check_interval": 5, "check_val_every_n_epoch": None}, 6, 16)
        15
    """
    interval, every = _interval_of(settings, batches), settings["check_val_every_n_epoch"]
    if every is None:
        return steps // interval * interval
    whole, rest = divmod(steps, batches)
    if (whole + 1) % every == 0 and rest >= interval:
        return int(whole * batches + rest // interval * interval)
    epochs = whole // every * every  # the last one of them validates
    return (epochs - 1) * batches + batches // interval * interval if epochs else 0


def _interval_of(settings: Mapping[str, Any], batches: int) -> int:
    """Batches between validations."""
    interval = settings["val_check_interval"]
    if interval is None:
        interval = 1.0
    return max(1, int(batches * interval)) if isinstance(interval, float) else int(interval)
