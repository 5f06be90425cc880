"""ExportCallback: writes the fine-tuned model in the Hugging Face format when training ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lwf_lightning.distributed import ranks_of
from lwf_lightning.files import require_free
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

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what would only fail after the training."""
        if stage != "fit":
            return
        if not isinstance(pl_module, LWFModule):
            raise TypeError(f"ExportCallback exports an LWFModule, not {type(pl_module).__name__}")
        if self.folder is not None and trainer.ckpt_path is None:
            require_free(Path(self.folder))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the model."""
        module = cast(LWFModule, pl_module)
        folder = Path(self.folder or Path(str(trainer.log_dir)) / "model")
        if self.folder is not None and trainer.ckpt_path is not None and folder.exists():
            rank_zero_warn(f"{folder} exists already: the model was not exported again")
            return
        model = module.whole_model()
        if model is not None and trainer.is_global_zero:
            if self.folder is None:
                shutil.rmtree(folder, ignore_errors=True)  # of this run, which has been resumed
            export_model(model, module.tokenizer, folder, merge=self.merge)
        ranks_of(trainer).wait()
        rank_zero_info(f"Exported the model to {folder}")
