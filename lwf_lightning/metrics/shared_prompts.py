"""Texts that begin alike, laid out as one: the choices of a question behind a single prompt.

A row holds the branches one after the other, then the prompt once. Which token sees which is up to
the attention mask, and where a token stands up to its position, so that the order of columns is
free; with the branches first, the columns that the head has to look at coincide among rows. Each
branch begins with the last token of the prompt, from which its first token is predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import IGNORE_INDEX, Batch, EncodedText, collate
from lwf_lightning.generation import unwrapped
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.trial import TRIAL_TOKENS, passes_trial

_PROMPT, _PADDING = -1, -2


def can_share_prompts(model: nn.Module, tokens: int) -> bool:
    """Whether a model takes a mask of our own making and attends to all of so many tokens."""
    from lwf_lightning.decoding import can_decode  # imports transformers: seconds

    base = unwrapped(model)
    # Others add the mask to the scores, or know none; SDPA alone takes a boolean one.
    return base.config._attn_implementation == "sdpa" and can_decode(base, tokens)


def shares_exactly(model: nn.Module, tokens: int) -> bool:
    """As :func:`can_share_prompts`, and a trial gave what the model predicts of texts alone."""
    is_proven = can_share_prompts(model, TRIAL_TOKENS) and passes_trial(model, _behind_one_prompt)
    return is_proven and can_share_prompts(model, tokens)


def _behind_one_prompt(model: Any, texts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """A way of :func:`~lwf_lightning.trial.passes_trial`: one more token has the last predict."""
    longer = [EncodedText((*ids, 0), (IGNORE_INDEX, IGNORE_INDEX, *ids[2:], 0)) for ids in texts]
    rows = with_tree_mask(share_prompts(collate(longer, 0)))
    device = next(model.parameters()).device
    tokens = labelled_tokens(model, {name: rows[name].to(device) for name in rows})
    parts = torch.split(tokens.logits, [len(ids) - 1 for ids in texts])
    return texts, torch.stack([part[-2:] for part in parts])


def share_prompts(batch: Batch) -> Batch:
    """Lays out neighbouring texts with the same prompt in one row.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens). A text's prompt
            is what precedes its first label.

    Returns:
        ``input_ids``, ``attention_mask`` (of padding), ``labels``, ``position_ids`` and ``text``,
        each (rows, columns); ``text`` is the text of the batch that a token belongs to, negative
        for prompts and padding.
    """
    columns = ("input_ids", "labels", "position_ids", "text")
    rows: list[list[tuple[int, int, int, int]]] = []
    prompt: list[int] = []
    lists = (batch[name].tolist() for name in ("input_ids", "labels", "attention_mask"))
    for text, (ids, labels, mask) in enumerate(zip(*lists, strict=True)):
        size = sum(mask)
        start = next((at for at in range(1, size) if labels[at] != IGNORE_INDEX), size)
        branch = [(ids[start - 1], IGNORE_INDEX, start - 1, text)]
        branch += [(ids[at], labels[at], at, text) for at in range(start, size)]
        if not rows or ids[:start] != prompt:
            prompt = ids[:start]
            shared = [(token, IGNORE_INDEX, at, _PROMPT) for at, token in enumerate(prompt[:-1])]
            rows.append(shared)
        end = len(rows[-1]) - len(prompt) + 1  # the prompt stays last
        rows[-1][end:end] = branch
    width = max(map(len, rows))
    padding = (0, IGNORE_INDEX, 0, _PADDING)
    table = torch.tensor(
        [row + [padding] * (width - len(row)) for row in rows], device=batch["input_ids"].device
    )
    laid_out = dict(zip(columns, table.unbind(-1), strict=True))
    return {**laid_out, "attention_mask": (laid_out["text"] != _PADDING).long()}


def with_tree_mask(batch: Batch) -> Batch:
    """The model's inputs and labels of rows by :func:`share_prompts`.

    A token sees what is not behind it of its own branch and of the prompt; padding sees itself.
    """
    text, position = batch["text"], batch["position_ids"]
    keys, queries = text[:, None, :], text[:, :, None]
    seen = (keys == queries) | ((keys == _PROMPT) & (queries != _PADDING))
    seen &= position[:, None, :] <= position[:, :, None]
    return {**{k: v for k, v in batch.items() if k != "text"}, "attention_mask": seen[:, None]}
