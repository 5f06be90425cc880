"""Checks the arguments of the datamodule; every message names the flag."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

_AT_LEAST_ONE = (
    "max_length",
    "batch_size",
    "eval_batch_size",
    "forget_batch_size",
    "learning_texts",
    "forgetting_prompts",
    "eval_examples",
    "max_new_tokens",
    "elicit_batch_size",
)


def check_arguments(values: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if an argument of :class:`LWFDataModule` is out of range.

    Args:
        values: The arguments by name; others are ignored.
    """
    for name in _AT_LEAST_ONE:
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"data.init_args.{name} must be at least 1, got {values[name]}")
    for name in ("num_workers", "seed"):
        if values[name] < 0:
            raise ValueError(f"data.init_args.{name} must be at least 0, got {values[name]}")
    learning, forgetting = values["learning_task"], values["forgetting_tasks"]
    if len(set(forgetting)) < len(forgetting):
        raise ValueError(f"data.init_args.forgetting_tasks names a task twice: {forgetting}")
    if learning in forgetting:
        warnings.warn(
            f"data.init_args.forgetting_tasks holds the learning task {learning!r}: "
            "what the model knows about it will be unlearned while it is learned",
            stacklevel=3,
        )
