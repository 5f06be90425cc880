"""Named exceptions."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """Too many steps in a run had a NaN or infinite gradient; its checkpoints are untouched."""
