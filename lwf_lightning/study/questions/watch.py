"""WatchUnlearning: what a run does to texts that are unlearned, kept, unseen, or foreign to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch

from lwf_lightning.data.batch import EncodedText, batches_of
from lwf_lightning.files import whole_file
from lwf_lightning.generation import evaluation_mode, generate_answers
from lwf_lightning.losses import per_text_loss
from lwf_lightning.metrics.fluency import fluency
from lwf_lightning.module import LWFModule


def write_watched(
    path: Path,
    sets: Mapping[str, Sequence[EncodedText]],
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
) -> None:
    """Writes down what to watch, so that several runs watch the same.

    Args:
        path: JSON file.
        sets: Texts by the name under which their loss is logged.
        prompts: Token ids of the prompts that are continued.
        pad_token_id: Id for padding.
    """
    texts = {name: [[text.input_ids, text.labels] for text in own] for name, own in sets.items()}
    with whole_file(path) as temporary:
        watched = {"sets": texts, "prompts": list(prompts), "pad_token_id": pad_token_id}
        temporary.write_text(json.dumps(watched), encoding="utf-8")


class WatchUnlearning(L.Callback):
    """Logs ``watch/...`` every few learning steps, before unlearning, and at the end.

    The mean negative log-likelihood of each set of texts (nats per token, means over texts) and
    the fluency of greedy continuations. It changes nothing in a run.

    Args:
        file: What :func:`write_watched` wrote.
        interval: Learning steps between two looks, at least 1.
        tokens: Tokens generated per prompt.

    Raises:
        ValueError: If ``interval`` is below 1.
    """

    def __init__(self, file: str, interval: int = 5, tokens: int = 24) -> None:
        if interval < 1:
            raise ValueError(f"WatchUnlearning's interval must be at least 1, got {interval}")
        watched = json.loads(Path(file).read_text(encoding="utf-8"))
        self.sets = {
            name: [EncodedText(tuple(ids), tuple(labels)) for ids, labels in texts]
            for name, texts in watched["sets"].items()
        }
        self.prompts: list[list[int]] = watched["prompts"]
        self.pad_token_id: int = watched["pad_token_id"]
        self.interval, self.tokens = interval, tokens
        self._looked_at = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks, if it is time."""
        if trainer.global_step % self.interval == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks for the last time."""
        self._look(trainer, pl_module)

    @torch.no_grad()
    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module, LWFModule):
            raise TypeError(f"WatchUnlearning needs an LWFModule, got {type(module).__name__}")
        step = trainer.global_step
        if step == self._looked_at:
            return
        self._looked_at = step
        figures = {}
        with trainer.precision_plugin.forward_context(), evaluation_mode(module.model):
            for name, texts in self.sets.items():
                if not texts:  # nothing is chosen, or nothing is left
                    continue
                losses = [
                    float(loss)
                    for batch in batches_of(texts, 32, self.pad_token_id)
                    for loss in per_text_loss(
                        module.model, {key: rows.to(module.device) for key, rows in batch.items()}
                    )
                ]
                figures[f"watch/{name}"] = fmean(losses)
            said = generate_answers(
                module.model,
                module.tokenizer,
                self.prompts,
                max_new_tokens=self.tokens,
                batch_size=len(self.prompts),
            )
        found = fluency(said)
        figures |= {"watch/repetition": found.repetition, "watch/distinct_2": found.distinct_2}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
