"""Whether long work inside a run shows bars of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L


def shows_progress(trainer: L.Trainer | None) -> bool:
    """Whether to show a bar: not where the trainer has none, by ``enable_progress_bar``.

    Args:
        trainer: The trainer; None where there is none, and somebody waits for a function.
    """
    return trainer is None or trainer.progress_bar_callback is not None
