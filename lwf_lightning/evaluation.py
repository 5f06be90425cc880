"""Validation, test and prediction of an LWFModule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lwf_lightning.data.evaluation import EvalBatch
from lwf_lightning.distributed import ranks_of
from lwf_lightning.evaluation_data import EvalStage, EvaluationDataMixin
from lwf_lightning.forgetting.report import write_jsonl
from lwf_lightning.generation import generate_answers, positions_of
from lwf_lightning.metrics import (
    ChoiceAccuracy,
    ExactMatch,
    choice_log_likelihoods,
    predicted_choices,
)
from lwf_lightning.runs import folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class EvaluationMixin(L.LightningModule):
    """The evaluation half of :class:`~lwf_lightning.LWFModule`: one loader per task."""

    model: PreTrainedModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Refuses validation texts that do not fit the model, before anything is trained."""
        if self.trainer.enable_validation:
            self._check_texts("val")

    def on_validation_start(self) -> None:
        """Refuses texts longer than the model, and prompts without room for an answer."""
        self._check_texts("val")

    def on_test_start(self) -> None:
        """Refuses texts longer than the model, and prompts without room for an answer."""
        self._check_texts("test")

    def on_validation_epoch_start(self) -> None:
        """Starts to count."""
        self._start()

    def on_test_epoch_start(self) -> None:
        """Starts to count."""
        self._start()

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to its task's accuracy."""
        self._count(batch, dataloader_idx)

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to its task's accuracy."""
        self._count(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/accuracy``, ``val/loss`` and the forgetting tasks' accuracies."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Logs ``test/accuracy``, ``test/loss`` and the forgetting tasks' accuracies."""
        self._report("test")

    def predict_step(
        self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Answers each prompt: rows of prompt, answer, what was read of it, reference, correct."""
        self._check_batch(batch)
        task = self._data.tasks[batch.task]
        answers = self._generate(batch)
        rows = []
        for example, answer in _counted(batch, zip(batch.examples, answers, strict=True)):
            read = task.read_answer(answer)
            rows.append(
                {
                    "prompt": example.prompt,
                    "answer": answer,
                    "read": read,
                    "reference": example.reference,
                    "correct": bool(read) and read == example.reference,
                }
            )
        self._predictions.extend(rows)
        return rows

    def on_predict_start(self) -> None:
        """Refuses prompts without room for an answer, and starts to collect."""
        self._check_texts("predict")
        self._predictions: list[dict[str, Any]] = []

    def on_predict_end(self) -> None:
        """Writes ``predictions.jsonl`` into the run folder, but not in ``fast_dev_run``."""
        folder = folder_of(self.trainer)
        ranks = ranks_of(self.trainer)
        rows = ranks.merge(self._predictions)
        if folder and ranks.is_first:
            write_jsonl(folder / "predictions.jsonl", rows)
        right = sum(row["correct"] for row in rows)
        where = f": {folder}/predictions.jsonl" if folder else ""
        rank_zero_info(f"{right} of {len(rows)} answers are right{where}")

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _check_texts(self, stage: EvalStage) -> None:
        if not isinstance(self._data, EvaluationDataMixin):
            return
        self._data.check_vocabulary(stage, self.model)
        if (positions := positions_of(self.model)) is not None:
            self._data.check_positions(stage, positions)

    def _start(self) -> None:
        self._accuracies: dict[int, Metric] = {}
        # Summed negative log-likelihood of the gold answers, and their tokens, per loader.
        self._losses: dict[int, Tensor] = {}

    def _check_batch(self, batch: object) -> None:
        if not isinstance(batch, EvalBatch):
            raise TypeError(
                f"LWFModule expects an EvalBatch of LWFDataModule, got {type(batch).__name__}: "
                "give datamodule=LWFDataModule(...) in place of loaders of your own, or override "
                "validation_step, test_step and predict_step"
            )
        if not isinstance(self._data, EvaluationDataMixin):
            raise TypeError(
                "LWFModule cannot evaluate an EvalBatch without the LWFDataModule that made it, "
                "which knows its tasks: give datamodule= in place of its loaders"
            )

    def _count(self, batch: EvalBatch, loader: int) -> None:
        self._check_batch(batch)
        if batch.kind == "choice":
            predicted, sums, counts = self._predict_choices(batch)
            self._accuracies.setdefault(loader, ChoiceAccuracy().to(self.device))
            self._accuracies[loader].update(predicted[batch.counts], batch.labels[batch.counts])
            first = batch.choice_counts.cumsum(0) - batch.choice_counts
            gold = (first + batch.labels)[batch.counts]
            loss = torch.stack([-sums[gold].double().sum(), counts[gold].double().sum()])
            self._losses[loader] = self._losses.get(loader, 0) + loss
        else:
            task = self._data.tasks[batch.task]
            self._accuracies.setdefault(loader, ExactMatch().to(self.device))
            answers = [task.read_answer(a) for a in _counted(batch, self._generate(batch))]
            references = [example.reference for example in _counted(batch, batch.examples)]
            self._accuracies[loader].update(answers, references)

    def _predict_choices(self, batch: EvalBatch) -> tuple[Tensor, Tensor, Tensor]:
        sums, counts = choice_log_likelihoods(self.model, batch.batch)
        return predicted_choices(sums, counts, batch.choice_counts), sums, counts

    def _generate(self, batch: EvalBatch) -> list[str]:
        mask = batch.batch["attention_mask"].bool()
        prompts = [
            ids[kept].tolist() for ids, kept in zip(batch.batch["input_ids"], mask, strict=True)
        ]
        answers = generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self._data.max_new_tokens,
            batch_size=len(prompts),
            stop=self._data.tasks[batch.task].stop,
        )
        return [
            str(self.tokenizer.decode(list(answer), skip_special_tokens=True)) for answer in answers
        ]

    def _report(self, stage: str) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))
        names = self._data.eval_names(stage) if self._accuracies else []  # a subclass counts itself
        for loader, name in enumerate(names):
            if loader in self._accuracies:  # else Lightning's limits left its loader empty
                self.log(name, self._accuracies[loader].compute(), prog_bar=loader == 0)
        if 0 in self._losses:
            total, tokens = ranks_of(self.trainer).sum(self._losses[0])
            self.log(f"{stage}/loss", (total / tokens).float(), prog_bar=True)


def _counted(batch: EvalBatch, values: Iterable[T]) -> list[T]:
    """The values of those examples that count."""
    return [value for value, counts in zip(values, batch.counts.tolist(), strict=True) if counts]
