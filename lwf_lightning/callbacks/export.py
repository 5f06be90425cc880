"""ExportCallback: writes the fine-tuned model in the Hugging Face format when training ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lwf_lightning.models import export_model
from lwf_lightning.module import LWFModule


class ExportCallback(L.Callback):
    """Writes model and tokenizer with ``save_pretrained`` at the end of a fit.

    With LoRA the folder holds ``adapter`` and, merged into the base weights, ``merged``.

    Args:
        folder: Where to write, absent or empty; None takes ``model`` in the run folder.
        merge: Whether to write the merged model beside a LoRA adapter.
    """

    def __init__(self, folder: str | None = None, merge: bool = True) -> None:
        self.folder = folder
        self.merge = merge

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the model."""
        if not isinstance(pl_module, LWFModule):
            raise TypeError(f"ExportCallback exports an LWFModule, not {type(pl_module).__name__}")
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model"
        export_model(pl_module.model, pl_module.tokenizer, folder, merge=self.merge)
        rank_zero_info(f"Exported the model to {folder}")
