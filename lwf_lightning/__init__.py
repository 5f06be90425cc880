"""Learning With Forgetting (LWF): fine-tune a language model while it forgets what is in the way.

The names below are loaded at their first use, so that the import itself stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwf_lightning.callbacks.export import ExportCallback
    from lwf_lightning.callbacks.fisher import FisherCallback
    from lwf_lightning.callbacks.guard import AscentGuard
    from lwf_lightning.datamodule import LWFDataModule
    from lwf_lightning.module import LWFModule
    from lwf_lightning.trainer import LWFTrainer

__version__ = "0.1.0"

__all__ = [
    "AscentGuard",
    "ExportCallback",
    "FisherCallback",
    "LWFDataModule",
    "LWFModule",
    "LWFTrainer",
]

_HOMES = {
    "AscentGuard": "lwf_lightning.callbacks.guard",
    "ExportCallback": "lwf_lightning.callbacks.export",
    "FisherCallback": "lwf_lightning.callbacks.fisher",
    "LWFDataModule": "lwf_lightning.datamodule",
    "LWFModule": "lwf_lightning.module",
    "LWFTrainer": "lwf_lightning.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("data", "demo", "forgetting", "losses", "metrics", "objectives", "tasks"):
        return import_module(f"lwf_lightning.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
