"""Validation, test and prediction sets of an LWFDataModule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import lightning as L
from torch.utils.data import DataLoader

from lwf_lightning.data.evaluation import EvalItem, EvalSplit, Evaluation, eval_items, eval_loader
from lwf_lightning.data.rows import Row, Split
from lwf_lightning.data.sampler import seeded_sample
from lwf_lightning.distributed import ranks_of
from lwf_lightning.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvaluationDataMixin(L.LightningDataModule):
    """The evaluation half of :class:`~lwf_lightning.LWFDataModule`: one loader per task."""

    tasks: dict[str, Task]
    learning_task: str
    forgetting_tasks: list[str]
    forgetting_examples: list[tuple[str, Example]]
    evaluation: Evaluation
    evaluate_forgetting: bool
    evaluate_seen: bool
    eval_examples: int | None
    eval_batch_size: int
    max_length: int
    chat_template: bool
    seed: int
    _eval_items: dict[tuple[str, EvalSplit, Evaluation], list[EvalItem]]

    @property
    def pad_token_id(self) -> int:
        """Id for padding."""
        raise NotImplementedError

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        raise NotImplementedError

    def _rows(self, name: str, split: Split) -> list[Row]:
        raise NotImplementedError

    def elicited_prompts(self) -> list[tuple[str, Example]]:
        """The prompts that self-knowledge is elicited from, each with the name of its task."""
        raise NotImplementedError

    @property
    def eval_tasks(self) -> list[str]:
        """The tasks of evaluation, one loader each: learning first, then each forgetting task.

        Those without gold answers are left out.
        """
        forgetting = self._answered_tasks if self.evaluate_forgetting else []
        return list(dict.fromkeys([self.learning_task, *forgetting]))

    @property
    def _seen_tasks(self) -> list[str]:
        return self._answered_tasks if self.evaluate_seen else []

    @property
    def _answered_tasks(self) -> list[str]:
        return [name for name in self.forgetting_tasks if self.tasks[name].has_answers]

    def eval_names(self, stage: Literal["val", "test"]) -> list[str]:
        """The names under which accuracies are logged, in the order of the loaders."""
        _, *forgetting = self.eval_tasks
        prefix = "forget" if stage == "val" else "test"
        seen = self._seen_tasks if stage == "val" else []
        return [
            f"{stage}/accuracy",
            *(f"{prefix}/accuracy_{name}" for name in forgetting),
            *(f"forget/seen_accuracy_{name}" for name in seen),
        ]

    def val_dataloader(self) -> list[DataLoader[EvalItem]]:
        """One loader of ``EvalBatch`` per task of ``eval_tasks``, on the validation split.

        With ``evaluate_seen``, then one per forgetting task, on the prompts that are elicited.
        """
        return [
            *(self._eval_loader(name, "validation", self.evaluation) for name in self.eval_tasks),
            *(self._eval_loader(name, "seen", self.evaluation) for name in self._seen_tasks),
        ]

    def test_dataloader(self) -> list[DataLoader[EvalItem]]:
        """As :meth:`val_dataloader`, for the test split."""
        return [self._eval_loader(name, "test", self.evaluation) for name in self.eval_tasks]

    def predict_dataloader(self) -> DataLoader[EvalItem]:
        """The test prompts of the learning task, to be answered by generation."""
        return self._eval_loader(self.learning_task, "test", "generate")

    def _eval_loader(self, name: str, split: EvalSplit, kind: Evaluation) -> DataLoader[EvalItem]:
        kind = self._eval_kind(name, kind)
        return eval_loader(
            self._eval_items[name, split, kind],
            task=name,
            kind=kind,
            batch_size=self.eval_batch_size,
            pad_token_id=self.pad_token_id,
            ranks=ranks_of(self.trainer),
        )

    def _eval_kind(self, name: str, wanted: Evaluation) -> Evaluation:
        return wanted if self.tasks[name].has_choices else "generate"

    def _prepare_evaluation(self, names: Iterable[str], split: EvalSplit, kind: Evaluation) -> None:
        for name in names:
            key = (name, split, self._eval_kind(name, kind))
            if key not in self._eval_items:
                examples = self._eval_examples(name, split)
                self._eval_items[key] = eval_items(
                    self._tokenizer, examples, key[2], self.max_length, self.chat_template
                )

    def _eval_examples(self, name: str, split: EvalSplit) -> list[Example]:
        if split == "seen":
            elicited = self.forgetting_examples or self.elicited_prompts()
            return [example for task, example in elicited if task == name]
        rows = seeded_sample(self._rows(name, split), self.eval_examples, self.seed)
        return self.tasks[name].examples(rows)
