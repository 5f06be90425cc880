"""Named exceptions."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """Too many steps in a run had a NaN or infinite gradient; its checkpoints are untouched."""


class DamagedFileError(ValueError):
    """A file is not what was once written: it is cut short, altered or of another kind."""


class DiskFullError(OSError):
    """There was no space for a file; nothing half-written is left under its name."""
