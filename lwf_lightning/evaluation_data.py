"""Validation, test and prediction sets of an LWFDataModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import lightning as L
from torch.utils.data import DataLoader

from lwf_lightning.data.evaluation import EvalItem, EvalSplit, Evaluation, eval_items, eval_loader
from lwf_lightning.data.rows import DataError, MissingFileError, Row, Split
from lwf_lightning.data.sampler import seeded_sample
from lwf_lightning.data.unreachable import warn_of_unreachable
from lwf_lightning.distributed import ranks_of
from lwf_lightning.tasks import Example, Task
from lwf_lightning.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EvalStage: TypeAlias = Literal["val", "test", "predict"]
EvalKey: TypeAlias = tuple[str, EvalSplit, Evaluation]
"""Task, split, and how its examples are asked."""


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
    max_new_tokens: int
    chat_template: bool
    seed: int
    _eval_items: dict[EvalKey, list[EvalItem]]

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
        return [self._eval_loader(key) for key in self._loader_keys("val")]

    def test_dataloader(self) -> list[DataLoader[EvalItem]]:
        """As :meth:`val_dataloader`, for the test split."""
        return [self._eval_loader(key) for key in self._loader_keys("test")]

    def predict_dataloader(self) -> DataLoader[EvalItem]:
        """The test prompts of the learning task, to be answered by generation."""
        (key,) = self._loader_keys("predict")
        return self._eval_loader(key)

    def check_positions(self, stage: EvalStage, positions: int) -> None:
        """Refuses texts, and prompts whose generated answers may, exceed the model's positions.

        Args:
            stage: The stage whose examples are looked at; they have to be there.
            positions: How many tokens prompt and answer may have together.

        Raises:
            DataError: If one does; names the row and the flag.
        """
        for key in self._loader_keys(stage):
            for item in self._eval_items[key]:
                tokens = max(map(len, item.texts))
                if key[2] == "choice" and tokens > positions:
                    raise DataError(
                        f"{item.example.source}: prompt and choice have {tokens} tokens, more than "
                        f"the model's {positions} positions; lower data.init_args.max_length="
                        f"{self.max_length} to that, or take the row out"
                    )
                if key[2] == "generate" and tokens + self.max_new_tokens > positions:
                    raise DataError(
                        f"{item.example.source}: the prompt has {tokens} tokens, and "
                        f"data.init_args.max_new_tokens={self.max_new_tokens} is more than the "
                        f"model's {positions} positions leave for an answer; lower it or take the "
                        "row out"
                    )

    def check_vocabulary(self, stage: EvalStage, model: Any) -> None:
        """Refuses examples of a stage with token ids that a model does not embed.

        Raises:
            ValueError: If there are some; names the task.
        """
        for key in self._loader_keys(stage):
            texts = (text.input_ids for item in self._eval_items[key] for text in item.texts)
            check_ids(texts, model, self._tokenizer, f"the {key[1]} examples of {key[0]}")

    def _loader_keys(self, stage: EvalStage) -> list[EvalKey]:
        """What each loader of a stage holds."""
        if stage == "predict":
            return [(self.learning_task, "test", "generate")]
        split: EvalSplit = "validation" if stage == "val" else "test"
        keys = [(name, split) for name in self.eval_tasks]
        if stage == "val":
            keys += [(name, "seen") for name in self._seen_tasks]
        return [
            (name, split, self.evaluation if self.tasks[name].has_choices else "generate")
            for name, split in keys
        ]

    def _eval_loader(self, key: EvalKey) -> DataLoader[EvalItem]:
        return eval_loader(
            self._eval_items[key],
            task=key[0],
            kind=key[2],
            batch_size=self.eval_batch_size,
            pad_token_id=self.pad_token_id,
            ranks=ranks_of(self.trainer),
        )

    def _prepare_evaluation(self, stage: EvalStage) -> None:
        for key in self._loader_keys(stage):
            if key not in self._eval_items:
                name, split, kind = key
                examples = self._eval_examples(name, split)
                self._eval_items[key] = eval_items(
                    self._tokenizer, examples, kind, self.max_length, self.chat_template
                )
                if kind == "generate":
                    warn_of_unreachable(
                        self._tokenizer,
                        self.tasks[name],
                        examples,
                        self.max_new_tokens,
                        self.chat_template,
                    )

    def _eval_examples(self, name: str, split: EvalSplit) -> list[Example]:
        if split == "seen":
            elicited = self.forgetting_examples or self.elicited_prompts()
            return [example for task, example in elicited if task == name]
        try:
            rows = self._rows(name, split)
        except MissingFileError as error:
            raise MissingFileError(f"{error}. {self._who_asks(name, split)}") from error
        return self.tasks[name].examples(seeded_sample(rows, self.eval_examples, self.seed))

    def _who_asks(self, name: str, split: Split) -> str:
        """What needs a split of a task, and how to do without."""
        if name != self.learning_task:
            return (
                "Forgetting tasks are evaluated, too: set data.init_args.evaluate_forgetting to "
                "false, or for a custom task that is to have prompts only its answer to null"
            )
        if split == "validation":
            return (
                "Validation needs it, and AscentGuard watches it, with trainer.limit_val_batches=0 "
                "too: put a few rows of train.jsonl aside for it"
            )
        return "Put a few rows of train.jsonl aside for it"
