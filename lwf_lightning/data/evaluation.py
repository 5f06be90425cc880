"""Batches for evaluation: choices to be scored, or prompts to be answered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lwf_lightning.data.batch import IGNORE_INDEX, Batch, EncodedText, collate
from lwf_lightning.data.encode import encode_question, encode_questions
from lwf_lightning.data.rows import DataError, Split
from lwf_lightning.ranks import Ranks
from lwf_lightning.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Evaluation: TypeAlias = Literal["choice", "generate"]
EvalSplit: TypeAlias = Split | Literal["seen"]
"""A split, or the prompts that self-knowledge is elicited from."""


@dataclass(frozen=True)
class EvalItem:
    """One example, encoded: one text per choice, or the prompt alone without labels.

    With ``counts`` false it is a repeat that only fills a rank's last batch up.
    """

    example: Example
    texts: tuple[EncodedText, ...]
    counts: bool = True


class EvalBatch:
    """Examples of one task, ready for the model.

    No dataclass: under ``bf16-true`` Lightning would look into it, and into its frozen examples,
    for numbers to cast.

    Attributes:
        task: Name of the task.
        kind: ``choice``: score every choice; ``generate``: generate an answer and read it.
        examples: The examples of the batch.
        batch: For ``choice``, one text per example and choice, in that order, labelled on the
            choice. For ``generate``, the prompt of each example without labels. Padded on the right
            in both: :func:`~lwf_lightning.generation.generate_answers` pads as it needs.
        choice_counts: Choices of each example, shape (examples,), int64; 0 for ``generate``.
        labels: The right choice of each example, shape (examples,), int64; -1 for ``generate``.
        counts: Whether each example counts, shape (examples,), bool; see :class:`EvalItem`.
    """

    def __init__(
        self,
        task: str,
        kind: Evaluation,
        examples: tuple[Example, ...],
        batch: Batch,
        choice_counts: Tensor,
        labels: Tensor,
        counts: Tensor,
    ) -> None:
        self.task = task
        self.kind: Evaluation = kind
        self.examples = examples
        self.batch = batch
        self.choice_counts = choice_counts
        self.labels = labels
        self.counts = counts

    def __len__(self) -> int:
        """Number of examples: the ``batch_size`` for logging."""
        return len(self.examples)

    def to(self, device: torch.device | str, **kwargs: Any) -> EvalBatch:
        """A copy on a device; this method is how Lightning moves it."""
        return EvalBatch(
            self.task,
            self.kind,
            self.examples,
            {name: tensor.to(device, **kwargs) for name, tensor in self.batch.items()},
            self.choice_counts.to(device, **kwargs),
            self.labels.to(device, **kwargs),
            self.counts.to(device, **kwargs),
        )


def eval_items(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    kind: Evaluation,
    max_length: int,
    chat_template: bool = False,
) -> list[EvalItem]:
    """Encodes examples for evaluation, in order.

    Args:
        tokenizer: Tokenizer of the model.
        examples: Examples of one task; with choices for ``choice``.
        kind: ``choice`` or ``generate``.
        max_length: Limit of a prompt in tokens, and for ``choice`` of prompt and choice.
        chat_template: Whether prompts go through the tokenizer's chat template.

    Raises:
        DataError: If a prompt leaves no room for its answer; names the example's source.
        ValueError: See :func:`~lwf_lightning.data.encode.encode_question`.
    """
    if kind == "choice":
        encoded, cut = encode_questions(tokenizer, examples, max_length, chat_template)
        if cut:
            warnings.warn(
                f"the choices of {len(cut)} of {len(examples)} questions are longer than "
                f"data.init_args.max_length={max_length} leaves room for, and are compared without "
                f"their end: raise it. {cut[0]} is the first",
                stacklevel=2,
            )
        return [EvalItem(e, tuple(texts)) for e, texts in zip(examples, encoded, strict=True)]
    items = []
    for example in examples:
        ids = encode_question(tokenizer, example.prompt, chat_template=chat_template)
        if len(ids) > max_length:
            raise DataError(
                f"{example.source}: the prompt has {len(ids)} tokens, more than "
                f"data.init_args.max_length={max_length}"
            )
        items.append(EvalItem(example, (EncodedText(ids, (IGNORE_INDEX,) * len(ids)),)))
    return items


def collate_eval(
    items: Sequence[EvalItem], *, task: str, kind: Evaluation, pad_token_id: int
) -> EvalBatch:
    """Makes one batch of a task's items, all of the same kind."""
    examples = tuple(item.example for item in items)
    choices = [len(item.texts) if kind == "choice" else 0 for item in items]
    labels = [
        -1 if example.label is None or kind == "generate" else example.label for example in examples
    ]
    return EvalBatch(
        task,
        kind,
        examples,
        collate([text for item in items for text in item.texts], pad_token_id),
        choice_counts=torch.tensor(choices),
        labels=torch.tensor(labels),
        counts=torch.tensor([item.counts for item in items]),
    )


def eval_loader(
    items: Sequence[EvalItem],
    *,
    task: str,
    kind: Evaluation,
    batch_size: int,
    pad_token_id: int,
    ranks: Ranks,
) -> DataLoader[EvalItem]:
    """A loader of :class:`EvalBatch` over this rank's share of a task's items, in order.

    Every rank gets as many items, and so makes as many passes.
    """
    share = list(ranks.share(items))
    if len(share) * ranks.world_size < len(items):
        share.append(replace(items[0], counts=False))
    items = share
    return DataLoader(
        items,  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=batch_size,
        collate_fn=partial(collate_eval, task=task, kind=kind, pad_token_id=pad_token_id),
        generator=torch.Generator(),  # the global one stays untouched
    )
