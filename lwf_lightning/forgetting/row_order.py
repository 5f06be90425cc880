"""Whether a loss hands the texts of a batch to the model in their order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lwf_lightning.data.batch import Batch


def is_in_order(input_ids: Tensor, attention_mask: Tensor | None, batch: Batch) -> bool:
    """Whether each row that the model is called with is, or is cut from, the same row of the batch.

    Padding may lie elsewhere. A row that was altered may be of any text: it is not in order.

    Args:
        input_ids: What the model is called with, as many rows as the batch has.
        attention_mask: The mask it is called with, if any.
        batch: What the loss was given; a row may be of any of its tensors of token ids.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]])}
        >>> is_in_order(torch.tensor([[5, 6], [8, 9]]), None, batch)
        True
        >>> is_in_order(torch.tensor([[8, 9], [5, 6]]), None, batch)
        False
    """
    if any(value is input_ids for value in batch.values()):
        return True
    texts = len(input_ids)
    own = [value.tolist() for value in batch.values() if value.ndim == 2 and len(value) == texts]
    rows = input_ids.tolist()
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        rows = [
            ids[held].tolist() for ids, held in zip(input_ids, attention_mask != 0, strict=True)
        ]
    return all(any(_holds(given[text], row) for given in own) for text, row in enumerate(rows))


def _holds(row: Sequence[int], part: Sequence[int]) -> bool:
    starts = range(len(row) - len(part) + 1)
    return any(row[start : start + len(part)] == part for start in starts)
