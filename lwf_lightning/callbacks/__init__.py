"""Lightning callbacks of the package."""

from lwf_lightning.callbacks.checkpoint import StepCheckpoint
from lwf_lightning.callbacks.export import ExportCallback
from lwf_lightning.callbacks.fisher import FisherCallback
from lwf_lightning.callbacks.guard import AscentGuard
from lwf_lightning.callbacks.progress import PhaseProgressBar
from lwf_lightning.callbacks.validate_first import ValidateFirst

__all__ = [
    "AscentGuard",
    "ExportCallback",
    "FisherCallback",
    "PhaseProgressBar",
    "StepCheckpoint",
    "ValidateFirst",
]
