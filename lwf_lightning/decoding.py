"""Greedy decoding with continuous batching: a finished row makes room for the next prompt at once.

Each row's keys and values fill a slot of their own from column 0 on. Rows of any length thus stand
beside each other, enter and leave, and nothing is shifted or padded to its neighbours' width.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lwf_lightning.trial import TRIAL_TOKENS, passes_trial

_PREFILL_TOKENS = 2048  # of prompts read in one pass: the arithmetic is busy, the memory small
_SLOT_TOKENS = 512  # a longer prompt takes the room of several
_NEEDED = {"position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def can_decode(model: Any, tokens: int) -> bool:
    """Whether :func:`decode` suits a model: attention alone, over all of so many tokens.

    Recurrent layers, windows narrower than that, and models that count positions by themselves
    are left to :mod:`lwf_lightning.fallback`. What a model does not tell :func:`decodes_exactly`
    finds out.
    """
    if not inspect.signature(model.forward).parameters.keys() >= _NEEDED:
        return False
    windows = [getattr(model.config, "window_size", None)]  # GPT-Neo's: its cache knows of none
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            return False
    return all(tokens < window for window in windows if window is not None)


def decodes_exactly(model: Any, tokens: int) -> bool:
    """As :func:`can_decode`, and a trial gave what the model predicts without :func:`decode`."""
    is_proven = can_decode(model, TRIAL_TOKENS) and passes_trial(model, _two_steps)
    return is_proven and can_decode(model, tokens)


def _two_steps(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """A way of :func:`~lwf_lightning.trial.passes_trial`."""
    rows, slots = [_Row(place, ids) for place, ids in enumerate(prompts)], _Slots(model, 2, 0)
    logits = torch.stack([slots.read(rows), slots.advance()], dim=1)
    return [[*row.prompt, row.answer[0]] for row in rows], logits


@torch.no_grad()
def decode(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    is_done: Callable[[Sequence[int]], bool],
    pad_id: int = 0,
    any_left: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, list[int]]]:
    """Continues each prompt with the most probable tokens, longest prompts first.

    Each turn is one forward pass of the model: either some prompts are read, or all rows at work
    get a token.

    Args:
        model: A causal LM in evaluation mode for which :func:`can_decode` holds.
        prompt_ids: Token ids of each prompt, at least one each.
        max_new_tokens: Upper limit of an answer's length in tokens.
        batch_size: Rows at work together; fewer where more than 512 tokens per row are needed.
        is_done: Whether an answer, given its ids so far, is complete.
        pad_id: Any id of the vocabulary.
        any_left: Asked before every turn whether some process has work left, given whether this
            one has. With sharded weights each forward pass needs all processes: one that has
            finished goes on with an idle pass until all have.

    Yields:
        Index of a prompt and its answer's ids, as they are finished.
    """
    longest_first = sorted(range(len(prompt_ids)), key=lambda place: -len(prompt_ids[place]))
    waiting = deque(_Row(place, prompt_ids[place]) for place in longest_first)
    slots = _Slots(model, max_new_tokens, pad_id)
    while any_left(bool(waiting or slots.rows)):
        if fresh := _next_rows(waiting, slots, batch_size):
            slots.read(fresh)
        elif slots.rows:
            slots.advance()
        else:
            slots.idle()
        for row in slots.remove(lambda ids: len(ids) >= max_new_tokens or is_done(ids)):
            yield row.place, row.answer


@dataclass
class _Row:
    place: int  # among the prompts given
    prompt: Sequence[int]
    answer: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens that the model has read: all but the last, which is its next input."""
        return len(self.prompt) + len(self.answer) - 1


def room_for(batch_size: int, prompt: int, answer: int) -> tuple[int, int]:
    """What :func:`decode` holds at most of a batch whose longest prompt has so many tokens.

    Returns:
        Prompts that are read in one pass, and tokens whose keys and values are held.
    """
    columns = prompt + answer - 1
    read = min(batch_size, max(1, _PREFILL_TOKENS // prompt))
    return read, max(columns, batch_size * min(columns, _SLOT_TOKENS))


def _next_rows(waiting: deque[_Row], slots: _Slots, batch_size: int) -> list[_Row]:
    """Rows to read now: none unless a quarter of the batch is free, for small passes are dear."""
    free = batch_size - len(slots.rows)
    if not waiting or free < max(1, batch_size // 4):
        return []
    columns = slots.columns_for([*slots.rows, waiting[0]])
    free = min(free, batch_size * _SLOT_TOKENS // columns - len(slots.rows))
    free = min(free, max(1, _PREFILL_TOKENS // len(waiting[0].prompt)))
    if not slots.rows:
        free = max(1, free)
    return [waiting.popleft() for _ in range(min(free, len(waiting)))]


class _Slots:
    """The rows at work, and the model's keys and values for them."""

    def __init__(self, model: Any, max_new_tokens: int, pad_id: int) -> None:
        self.model, self.max_new_tokens, self.pad_id = model, max_new_tokens, pad_id
        self.device = next(model.parameters()).device
        self.rows: list[_Row] = []
        self.layers: list[_SlotLayer] = []

    def columns_for(self, rows: Sequence[_Row]) -> int:
        """Columns that the longest of these rows may come to fill."""
        return max(len(row.prompt) for row in rows) + self.max_new_tokens - 1

    def read(self, fresh: list[_Row]) -> Tensor:
        """Reads the prompts of new rows, padded on the right; adds and returns what follows."""
        lengths = torch.tensor([len(row.prompt) for row in fresh])
        width = int(lengths.max())
        padded = [[*row.prompt, *[self.pad_id] * (width - len(row.prompt))] for row in fresh]
        ends, own_end = torch.unique(lengths - 1, return_inverse=True)
        columns = torch.arange(width)
        read = DynamicCache()
        logits = self._logits(
            torch.tensor(padded),
            columns.expand(len(fresh), -1),
            columns < lengths[:, None],
            read,
            ends.to(self.device),
        )
        following = _append(fresh, logits[torch.arange(len(fresh)), own_end])
        if not self.layers:
            self.layers = [_SlotLayer() for _ in read.layers]
        capacity = self.columns_for([*self.rows, *fresh])
        for layer, prompts in zip(self.layers, read.layers, strict=True):
            layer.admit(prompts, len(self.rows), capacity)
        self.rows += fresh
        return following

    def advance(self) -> Tensor:
        """Adds one token to every row; returns its logits."""
        ends = torch.tensor([row.cached for row in self.rows])
        width = int(ends.max()) + 1
        step = (torch.arange(len(ends), device=self.device), ends.to(self.device), width)
        for layer in self.layers:
            layer.step = step
        logits = self._logits(
            torch.tensor([row.answer[-1:] for row in self.rows]),
            ends[:, None],
            torch.arange(width) <= ends[:, None],
            Cache(layers=[*self.layers]),
            1,
        )
        return _append(self.rows, logits[:, -1])

    def idle(self) -> None:
        """A forward pass for the other processes' sake."""
        one = torch.ones(1, 1, dtype=torch.long)
        self._logits(one * self.pad_id, one * 0, one.bool(), DynamicCache(), 1)

    def remove(self, is_done: Callable[[Sequence[int]], bool]) -> Iterator[_Row]:
        """Takes out the rows that are done; the last row moves into each gap."""
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if not is_done(row.answer):
                continue
            last = self.rows.pop()
            if last is not row:
                for layer in self.layers:
                    layer.move(len(self.rows), slot)
                self.rows[slot] = last
            yield row

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any, keep: Any) -> Any:
        return self.model(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=mask.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits


def _append(rows: Sequence[_Row], logits: Tensor) -> Tensor:
    for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
        row.answer.append(token)
    return logits


class _SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, each (slots, heads, columns, size); the first slots are used.

    Attributes:
        step: The used slots, the column at which each takes its next token, and how many columns
            attention then looks at.
    """

    keys: Any
    values: Any
    step: tuple[Tensor, Tensor, int]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def admit(self, prompts: Any, used: int, capacity: int) -> None:
        """Puts the rows of a plain cache layer behind the used slots, in as many columns."""
        self.keys = _grown(self.keys, prompts.keys, used, capacity)
        self.values = _grown(self.values, prompts.values, used, capacity)
        self.is_initialized = True

    def move(self, source: int, target: int) -> None:
        """Copies one slot over another."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Adds one token to each used slot; returns what attention looks at."""
        slots, columns, width = self.step
        # Under autocast the types differ: a plain layer keeps values in the type of its keys.
        self.keys[slots, :, columns] = key_states[:, :, 0].to(self.keys)
        self.values[slots, :, columns] = value_states[:, :, 0].to(self.values)
        return self.keys[: len(slots), :, :width], self.values[: len(slots), :, :width]

    def get_seq_length(self) -> int:
        """The column before which every row's tokens lie, as the causal mask counts."""
        return self.step[2] - 1


def _grown(old: Tensor | None, new: Tensor, used: int, capacity: int) -> Tensor:
    # Zeros: attention multiplies what is masked by 0, and leftover memory may hold NaN.
    grown = new.new_zeros(used + new.shape[0], new.shape[1], capacity, new.shape[3])
    if old is not None and used:
        kept = min(capacity, old.shape[2])
        grown[:used, :, :kept] = old[:used, :, :kept]
    grown[used:, :, : new.shape[2]] = new
    return grown
