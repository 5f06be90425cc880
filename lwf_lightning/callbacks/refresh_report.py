"""What a refresh of the FisherCallback leaves behind: figures, files and a line in the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lwf_lightning.distributed import ranks_of
from lwf_lightning.forgetting.confidence import ForgettingConfidence
from lwf_lightning.forgetting.report import markdown_table, score_rows, write_jsonl
from lwf_lightning.forgetting.tensors import load_tensors, save_tensors
from lwf_lightning.memory_report import size
from lwf_lightning.runs import folder_of
from lwf_lightning.shards import local, whole


def log_refresh(
    trainer: L.Trainer, scores: ForgettingConfidence, forget_set: Sequence[int]
) -> None:
    """Logs the spread of the scores and writes ``scores/step-<n>.jsonl`` into the run folder."""
    step, confidence = trainer.global_step, scores.confidence
    figures = {
        "forget/texts": float(len(confidence)),
        "forget/texts_selected": float(len(forget_set)),
        "forget/alpha": scores.alpha,
        "forget/confidence_mean": float(confidence.mean()),
        "forget/confidence_highest": float(confidence.max()),
        "forget/confidence_lowest": float(confidence.min()),
    }
    knowledge = getattr(getattr(trainer, "datamodule", None), "self_knowledge", None)
    rows = list(score_rows(knowledge.texts, scores, forget_set)) if knowledge else []
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=step)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram("forget/confidence", confidence, step)
            if rows:
                logger.experiment.add_text("forget/texts", markdown_table(rows), step)
    folder = folder_of(trainer)
    trains = getattr(trainer, "trains", True)  # or else score writes where it is told to
    if folder and rows and trains and trainer.is_global_zero:
        write_jsonl(folder / "scores" / f"step-{step:06d}.jsonl", rows)
    rank_zero_info(
        f"FisherCallback: step {step}: {len(forget_set)} of {len(confidence)} texts "
        f"chosen to be forgotten (alpha {scores.alpha:.3g})"
    )


def write_tensors(
    trainer: L.Trainer, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> str | None:
    """Writes ``fisher/step-<n>.safetensors`` into the run folder and returns its path.

    One file per refresh: an earlier checkpoint goes on pointing to its own. In ``fast_dev_run``
    nothing is written.
    """
    folder = folder_of(trainer)
    if folder is None:
        return None
    file = folder / "fisher" / f"step-{trainer.global_step:06d}.safetensors"
    tensors = {}
    for kind, part in {"fisher": fisher, "anchor": anchor}.items():
        for name, tensor in part.items():
            gathered = whole(tensor)  # by all ranks together, one at a time
            if trainer.is_global_zero:
                tensors[f"{kind}/{name}"] = gathered.cpu()
    if trainer.is_global_zero:
        save_tensors(file, tensors)
    ranks_of(trainer).wait()
    return str(file)


def read_tensors(file: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fisher and anchor of :func:`write_tensors`, each by parameter name."""
    kinds: dict[str, dict[str, Tensor]] = {"fisher": {}, "anchor": {}}
    for key, tensor in load_tensors(file).items():
        kind, name = key.split("/", 1)
        kinds[kind][name] = tensor
    return kinds["fisher"], kinds["anchor"]


def memory_of_refresh(parameters: Mapping[str, Tensor], saved: bool) -> str:
    """Says how much memory Fisher and anchor take, and how much is written to disk."""
    count = sum(parameter.numel() for parameter in parameters.values())
    held = [local(parameter) for parameter in parameters.values()]
    fisher = 4 * sum(part.numel() for part in held)
    anchor = sum(part.numel() * part.element_size() for part in held)
    return (
        f"{count:,} trainable parameters; a refresh holds the Fisher "
        f"({size(fisher)}) and the anchor ({size(anchor)}) in memory"
        + (f", and writes {size(fisher + anchor)} to disk" if saved else "")
    )
