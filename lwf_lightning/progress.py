"""Whether long work inside a run shows bars of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L


def shows_progress(trainer: L.Trainer | None) -> bool:
    """Whether to show a bar: on the first process, unless the trainer has none itself.

    Args:
        trainer: The trainer; None where there is none, and somebody waits for a function.
    """
    if trainer is None:
        return True
    return trainer.is_global_zero and trainer.progress_bar_callback is not None
