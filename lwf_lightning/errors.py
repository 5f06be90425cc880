"""Named exceptions."""

from __future__ import annotations


class NonFiniteLossError(ValueError):
    """The numbers exploded: losses, gradients or scores are NaN or infinite.

    Said by a run with too many such steps, whose checkpoints are untouched, and by the probe, the
    Fisher information and the scores of texts.
    """


class DamagedFileError(ValueError):
    """A file is not what was once written: it is cut short, altered or of another kind."""


class DiskFullError(OSError):
    """There was no space for a file; nothing half-written is left under its name."""
