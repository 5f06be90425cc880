"""ExportCallback: writes the fine-tuned model in the Hugging Face format when training ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lwf_lightning.distributed import ranks_of
from lwf_lightning.files import require_free, whole_folder
from lwf_lightning.models import export_model
from lwf_lightning.module import LWFModule
from lwf_lightning.runs import folder_of

_MARKER = "run_folder.txt"  # in an export, names the run that it is of


class ExportCallback(L.Callback):
    """Writes model and tokenizer with ``save_pretrained`` at the end of a fit.

    With LoRA the folder holds ``adapter`` and, merged into the base weights, ``merged``. Its
    ``run_folder.txt`` names the run. In ``fast_dev_run`` nothing is written.

    Args:
        folder: Where to write, absent or empty; None takes ``model`` in ``trainer.log_dir``, the
            run folder. What a run of LWFTrainer has exported is replaced when that run goes on, in
            its own run folder; nothing else ever is.
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
        run = folder_of(trainer)
        if run is not None and not self._is_own(trainer, run):
            require_free(self._target(run))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the model."""
        module, run = cast(LWFModule, pl_module), folder_of(trainer)
        if run is None:
            return
        model, folder = module.whole_model(), self._target(run)
        if model is not None and trainer.is_global_zero:
            if self._is_own(trainer, run):
                shutil.rmtree(folder, ignore_errors=True)
            with whole_folder(folder) as temporary:
                export_model(model, module.tokenizer, temporary, merge=self.merge)
                (temporary / _MARKER).write_text(str(run.resolve()), encoding="utf-8")
        ranks_of(trainer).wait()
        rank_zero_info(f"Exported the model to {folder}")

    def _target(self, run: Path) -> Path:
        return run / "model" if self.folder is None else Path(self.folder).expanduser()

    def _is_own(self, trainer: L.Trainer, run: Path) -> bool:
        """Whether what is there is this run's: only LWFTrainer has a folder for each."""
        if not hasattr(trainer, "run_folder"):
            return False
        if self.folder is None:
            return True
        if trainer.ckpt_path is None:  # it begins, perhaps in the folder of one that was removed
            return False
        marker = self._target(run) / _MARKER
        return marker.is_file() and marker.read_text(encoding="utf-8") == str(run.resolve())
