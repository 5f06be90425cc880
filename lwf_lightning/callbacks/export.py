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
from lwf_lightning.runs import folder_of


class ExportCallback(L.Callback):
    """Writes model and tokenizer with ``save_pretrained`` at the end of a fit.

    With LoRA the folder holds ``adapter`` and, merged into the base weights, ``merged``. In
    ``fast_dev_run`` nothing is written.

    Args:
        folder: Where to write, absent or empty; None takes ``model`` in ``trainer.log_dir``, the
            run folder. Only that of a run of LWFTrainer that goes on is written again.
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
        folder = self._target(trainer)
        kept = self.folder is not None and trainer.ckpt_path is not None
        if folder is not None and not kept and not self._replaces(trainer):
            require_free(folder)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the model."""
        module = cast(LWFModule, pl_module)
        folder = self._target(trainer)
        if folder is None:
            return
        if self.folder is not None and trainer.ckpt_path is not None and folder.exists():
            rank_zero_warn(f"{folder} exists already: the model was not exported again")
            return
        model = module.whole_model()
        if model is not None and trainer.is_global_zero:
            if self._replaces(trainer):
                shutil.rmtree(folder, ignore_errors=True)  # of this run, which has been resumed
            export_model(model, module.tokenizer, folder, merge=self.merge)
        ranks_of(trainer).wait()
        rank_zero_info(f"Exported the model to {folder}")

    def _target(self, trainer: L.Trainer) -> Path | None:
        run = folder_of(trainer)
        if run is None:
            return None
        return run / "model" if self.folder is None else Path(self.folder)

    def _replaces(self, trainer: L.Trainer) -> bool:
        """Whether what is there is this run's own: only LWFTrainer has a folder for one run."""
        return self.folder is None and hasattr(trainer, "run_folder")
