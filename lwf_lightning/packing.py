"""Texts one after another in one row: nothing is padding, and each attends to itself alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import Batch, EncodedText, collate
from lwf_lightning.data.passes import fill_rows, take_texts, texts_of_passes
from lwf_lightning.generation import unwrapped
from lwf_lightning.trial import TRIAL_TOKENS, passes_trial

TEXT_BY_TEXT = "text_by_text"
"""The attention of transformers under which a row may hold several texts."""


def attend_text_by_text(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    text_lengths: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA within each text of a row: the sum of squares of lengths, not the square of the sum.

    Neighbouring texts of one length go together. The arguments are those of any attention of
    transformers, but that ``text_lengths`` takes the place of a mask.

    Args:
        module: The attention layer.
        query: Shape (1, heads, tokens of all texts, width).
        key: As ``query``, with perhaps fewer heads.
        value: As ``key``.
        attention_mask: None, as transformers makes no mask for an attention of others.
        text_lengths: Tokens of each text of the row, in order; all are one text without them.
        **options: What transformers' own SDPA takes.

    Returns:
        Shape (1, tokens of all texts, heads, width); and no weights.

    Raises:
        ValueError: If the layer has made a mask by itself, as Doge's does: it would be lost.
    """
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} adds a mask of its own to its attention")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    runs = [
        (length, len(list(texts))) for length, texts in groupby(text_lengths or query.shape[2:3])
    ]
    sizes = [length * texts for length, texts in runs]
    rows = (torch.split(row.squeeze(0), sizes, dim=1) for row in (query, key, value))
    outputs = []
    for (length, texts), *parts in zip(runs, *rows, strict=True):
        q, k, v = (part.unflatten(1, (texts, length)).transpose(0, 1) for part in parts)
        output, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def can_attend_text_by_text(model: nn.Module, tokens: int, device: torch.device | str) -> bool:
    """Whether texts of up to so many tokens may lie in one row, and whether that pays.

    The model's attention has to go through the interface of transformers, by its own SDPA, and see
    the whole of a text. On an accelerator a layer would start its kernels once for each length:
    padding is reasoned to be cheaper there, which was not measured.

    Args:
        model: A causal LM, with or without a LoRA adapter.
        tokens: Tokens of the longest text.
        device: Where the model runs.
    """
    from transformers import PreTrainedModel

    from lwf_lightning.decoding import can_decode  # imports transformers: seconds

    base = unwrapped(model)
    return (
        torch.device(device).type == "cpu"
        and isinstance(base, PreTrainedModel)
        and base.is_backend_compatible()  # type: ignore[no-untyped-call]
        and base.config._attn_implementation == "sdpa"
        and not base.config.sub_configs  # each could have an attention of its own
        and can_decode(base, tokens)
    )


def is_text_by_text(model: Any) -> bool:
    """Whether the model's attention now takes several texts in a row."""
    config = getattr(unwrapped(model), "config", None)
    return getattr(config, "_attn_implementation", None) == TEXT_BY_TEXT


@contextmanager
def text_by_text(model: nn.Module, batch: Batch) -> Iterator[bool]:
    """Has :func:`~lwf_lightning.losses.labelled_tokens` lay the texts of a batch in one row.

    What runs within, backward passes included (checkpointing calls the attention there once
    more), may take any part of the batch. Where a model cannot, nothing changes. All processes
    have to enter together if the weights are sharded.

    Args:
        model: A causal LM.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens).

    Yields:
        Whether texts lie in one row.
    """
    mask = batch["attention_mask"]
    longest = int(mask.sum(dim=1).max())
    is_proven = can_attend_text_by_text(model, TRIAL_TOKENS, mask.device) and passes_trial(
        model, _in_one_row
    )
    if is_proven and can_attend_text_by_text(model, longest, mask.device):
        with _attention_text_by_text(unwrapped(model)):
            yield True
    else:
        yield False


@contextmanager
def _attention_text_by_text(base: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(TEXT_BY_TEXT, attend_text_by_text)
    usual = base.config._attn_implementation
    base.set_attn_implementation(TEXT_BY_TEXT)
    try:
        yield
    finally:
        base.set_attn_implementation(usual)


def _in_one_row(model: Any, texts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """A way of :func:`~lwf_lightning.trial.passes_trial`."""
    row = one_row(collate([EncodedText(tuple(ids), tuple(ids)) for ids in texts], 0))
    with _attention_text_by_text(unwrapped(model)):
        logits = model(**row, use_cache=False).logits[0]
    parts = logits.split([len(ids) for ids in texts])
    return texts, torch.stack([part[-2:] for part in parts])


@contextmanager
def forward_passes(
    model: nn.Module, batch: Batch, max_tokens: int | None = None
) -> Iterator[list[Batch]]:
    """Cuts a batch into those of its forward passes: rows without padding, if the model can.

    A loss that is a sum over tokens, divided by the tokens of the *whole* batch, has the same
    gradient in all passes together as in one. Each pass costs the traffic of the weights and their
    gradients, so there is one, or as few as ``max_tokens`` allows. See :func:`text_by_text` for
    what may run within, and :func:`~lwf_lightning.data.passes.group_by_length` for other models.

    Args:
        model: The model that will see them.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens).
        max_tokens: At most so many tokens per pass, padding included; a longer text goes alone.

    Yields:
        The batch of each pass, padded.
    """
    with text_by_text(model, batch) as is_packed:
        if is_packed:
            groups = fill_rows(batch["attention_mask"].sum(dim=1).tolist(), max_tokens)
        else:
            groups = texts_of_passes(model, batch, max_tokens)
        yield [take_texts(batch, texts) for texts in groups]


def one_row(batch: Batch) -> dict[str, Any]:
    """The texts of a batch one after another, as a model that goes text by text takes them.

    Args:
        batch: ``input_ids`` and ``attention_mask``, each (texts, tokens); perhaps
            ``position_ids``, or else each text's are counted.

    Returns:
        ``input_ids`` and ``position_ids``, each (1, tokens of all texts), and ``text_lengths``.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
        >>> row = one_row({"input_ids": ids, "attention_mask": mask})
        >>> row["input_ids"].tolist(), row["position_ids"].tolist(), row["text_lengths"]
        ([[5, 6, 7, 8, 9]], [[0, 1, 0, 1, 2]], [2, 3])
    """
    held = batch["attention_mask"].bool()
    positions = batch.get("position_ids", held.cumsum(dim=1) - 1).expand_as(held)
    return {
        "input_ids": batch["input_ids"][held].unsqueeze(0),
        "position_ids": positions[held].unsqueeze(0),
        "text_lengths": held.sum(dim=1).tolist(),
    }
