"""The feature of each text that feature penalties look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import Batch
from lwf_lightning.losses import labelled_columns


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the head of a causal LM reads: hidden states after the final norm.

    Args:
        model: A ``transformers`` causal LM, with or without a LoRA adapter.

    Yields:
        A list to which each forward pass within the context adds its hidden states, of shape
        (texts, columns, hidden size), where the columns are those of
        :func:`~lwf_lightning.losses.labelled_columns`, or all of them; or (1, labelled tokens,
        hidden size), text by text, where texts lie in one row.
    """
    head: nn.Module = model.get_output_embeddings()
    found: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def prompt_features(hidden: Tensor, batch: Batch) -> Tensor:
    """The hidden state at each text's last prompt token, which predicts the first answer token.

    Args:
        hidden: What :func:`head_inputs` collected in the pass of this batch.
        batch: ``labels`` of shape (texts, tokens).

    Returns:
        Shape (texts with a label, hidden size); texts without one are fillers.
    """
    wanted, columns = labelled_columns(batch)
    is_text = wanted.any(dim=1)
    if len(hidden) < len(wanted):  # in one row
        labelled = wanted.sum(dim=1)
        return hidden[0, (labelled.cumsum(dim=0) - labelled)[is_text]]
    place = wanted.to(torch.int64).argmax(dim=1)
    if hidden.shape[1] == len(columns):  # or else the head has read every position
        place = torch.searchsorted(columns, place)
    rows = is_text.nonzero().squeeze(1)
    return hidden[rows, place[rows]]
