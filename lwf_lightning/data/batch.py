"""Texts as token ids, and how they become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that carries no loss (the convention of torch and transformers)."""

Batch: TypeAlias = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``: int64 tensors of shape (texts, tokens)."""


@dataclass(frozen=True)
class EncodedText:
    """One text ready for a causal LM.

    Attributes:
        input_ids: Token ids of prompt and answer, unpadded.
        labels: As long as ``input_ids``: the token id where the token belongs to the answer,
            ``IGNORE_INDEX`` elsewhere. Not shifted: position t is predicted from position t - 1.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


def filler(text: EncodedText) -> EncodedText:
    """A short text without labels, which adds nothing to any loss.

    Where a rank has fewer texts than the others it fills the batch up, so that every rank makes
    the same passes.
    """
    ids = text.input_ids[:2]
    return EncodedText(ids, (IGNORE_INDEX,) * len(ids))


def collate(texts: Sequence[EncodedText], pad_token_id: int) -> Batch:
    """Pads texts on the right into one batch.

    Padding is masked by position, never by id, so a pad token that equals the end-of-text token
    costs no label.

    Args:
        texts: At least one text.
        pad_token_id: Id written into the padding; it never carries a label.

    Returns:
        A batch of shape (texts, longest text).

    Raises:
        ValueError: If ``texts`` is empty.

    Example:
        >>> short = EncodedText((5, 6), (-100, 6))
        >>> longer = EncodedText((5, 6, 7), (-100, 6, 7))
        >>> collate([short, longer], pad_token_id=0)["input_ids"].tolist()
        [[5, 6, 0], [5, 6, 7]]
    """
    if not texts:
        raise ValueError("cannot collate an empty list of texts")
    lengths = torch.tensor([len(text) for text in texts])
    held = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(held.shape, pad_token_id)
    labels = torch.full(held.shape, IGNORE_INDEX)
    input_ids[held] = torch.tensor([id for text in texts for id in text.input_ids])
    labels[held] = torch.tensor([label for text in texts for label in text.labels])
    return {"input_ids": input_ids, "attention_mask": held.long(), "labels": labels}


def padded_right(batch: Batch) -> Batch:
    """The batch with each text's padding at its end, wherever it was.

    Example:
        >>> ids, mask = torch.tensor([[0, 5, 6], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        >>> padded_right(batch)["input_ids"].tolist()
        [[5, 6, 0], [5, 6, 7]]
    """
    padding = batch["attention_mask"] == 0
    if not bool(padding[:, :1].any()):
        return batch
    order = padding.long().argsort(dim=1, stable=True)
    parts = ("input_ids", "attention_mask", "labels")
    return {**batch, **{name: batch[name].gather(1, order) for name in parts}}


def batches_of(texts: Sequence[EncodedText], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Cuts texts into consecutive batches, in order; the last may be smaller.

    Args:
        texts: Texts in the order in which results are wanted.
        batch_size: Texts per batch, at least 1.
        pad_token_id: See :func:`collate`.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(texts), batch_size):
        yield collate(texts[start : start + batch_size], pad_token_id)
