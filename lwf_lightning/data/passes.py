"""A batch cut into forward passes of texts of similar length: little padding, the same gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lwf_lightning.data.batch import Batch


def pass_cost(device: torch.device | str, parameters: int) -> int:
    """What one more forward and backward pass costs beside its tokens, counted in tokens.

    On a CPU it is the traffic of the weights and their gradients. It grows with the weights as the
    arithmetic of a token does, so that one figure serves any model; it was measured on a model of
    135 million. On an accelerator the launch of the kernels comes on top, which weighs the more
    the smaller the model; that figure is reasoned, not measured.

    Args:
        device: Where the model runs.
        parameters: Weights of the model.
    """
    if torch.device(device).type == "cpu":
        return 64
    return 512 + 2_000_000_000_000 // max(parameters, 1)


def group_by_length(
    lengths: Sequence[int], pass_cost: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Divides texts among passes such that padded tokens and passes cost least together.

    Args:
        lengths: Tokens of each text.
        pass_cost: What one more pass costs, in tokens; see :func:`pass_cost`.
        max_tokens: At most so many tokens per pass, padding included; a longer text goes alone.

    Returns:
        Indices of the texts of each pass in ascending order, the passes of long texts first.

    Example:
        >>> group_by_length([10, 90, 11, 88], pass_cost=20)
        [[1, 3], [0, 2]]
        >>> group_by_length([10, 90, 11, 88], pass_cost=200)
        [[0, 1, 2, 3]]
        >>> group_by_length([10, 90, 11, 88], pass_cost=200, max_tokens=100)
        [[1], [3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda text: lengths[text])
    # The least cost of the first n texts in this order, and where their last pass begins.
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        begins = range(end) if not max_tokens else range(max(0, end - max_tokens // width), end)
        options = [(costs[start] + (end - start) * width, start) for start in begins]
        cost, start = min(options, default=(costs[end - 1] + width, end - 1))
        costs.append(cost + pass_cost)
        starts.append(start)
    groups, end = [], len(order)
    while end > 0:
        groups.append(sorted(order[starts[end] : end]))
        end = starts[end]
    return groups


def fill_rows(lengths: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
    """Divides texts among rows without padding: few rows, texts of one length side by side.

    Args:
        lengths: Tokens of each text.
        max_tokens: At most so many tokens per row; a longer text goes alone.

    Returns:
        Indices of the texts of each row, long texts first.

    Example:
        >>> fill_rows([10, 90, 11, 88])
        [[1, 3, 2, 0]]
        >>> fill_rows([10, 90, 11, 88], max_tokens=100)
        [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    room: list[float] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((row for row, left in enumerate(room) if lengths[text] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens or math.inf)
        rows[row].append(text)
        room[row] -= lengths[text]
    return rows


def texts_of_passes(
    model: nn.Module, batch: Batch, max_tokens: int | None = None
) -> list[list[int]]:
    """Which texts of a batch go through the model together.

    Args:
        model: The model that will see them.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens).
        max_tokens: See :func:`group_by_length`.

    Returns:
        Rows of the batch for each pass.
    """
    mask = batch["attention_mask"]
    cost = pass_cost(mask.device, sum(parameter.numel() for parameter in model.parameters()))
    return group_by_length(mask.sum(dim=1).tolist(), cost, max_tokens)


def take_texts(batch: Batch, texts: Sequence[int]) -> Batch:
    """The part of a batch with these texts, without the columns that are padding in all of them."""
    rows = torch.tensor(texts, dtype=torch.int64, device=batch["input_ids"].device)
    part = {key: value[rows] for key, value in batch.items()}
    used = part["attention_mask"].any(dim=0)
    tokens = part["attention_mask"].shape[1]
    return {
        key: value[:, used] if value.ndim > 1 and value.shape[1] == tokens else value
        for key, value in part.items()
    }
