"""Greedy answers of models that :mod:`lwf_lightning.decoding` does not suit, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lwf_lightning.trial import passes_trial


def answer_in_batches(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_ids: Sequence[int],
    is_stopped: Callable[[Sequence[int]], bool],
    pad_id: int,
    any_left: Callable[[bool], bool] | None,
) -> Iterator[tuple[int, list[int]]]:
    """Continues each prompt with the most probable tokens, longest prompts first.

    By the model's own ``generate``, with prompts of unequal length padded on the left if that does
    not change its answers. Where even prompts of equal length are answered otherwise than by the
    model alone, it reads the whole text anew for each token.

    Args:
        model: A causal LM in evaluation mode.
        prompt_ids: Token ids of each prompt, at least one each.
        max_new_tokens: Upper limit of an answer's length in tokens.
        batch_size: Prompts in a batch.
        eos_ids: Ids that end an answer.
        is_stopped: Whether an answer, given its ids so far, may end for another reason.
        pad_id: Any id of the vocabulary.
        any_left: With sharded weights, whether some process has work left, given whether this one
            has; see :func:`~lwf_lightning.decoding.decode`.

    Yields:
        Index of a prompt and its answer's ids, which may go on after its end.
    """
    pads, generates = generates_exactly(model)
    waiting = sorted(range(len(prompt_ids)), key=lambda place: -len(prompt_ids[place]))
    config = _greedy_config(max_new_tokens, eos_ids, pad_id)
    with _configured(model, config):
        while (any_left or bool)(bool(waiting)):
            rows = [
                place
                for place in waiting[:batch_size]
                if pads or len(prompt_ids[place]) == len(prompt_ids[waiting[0]])
            ]
            del waiting[: len(rows)]
            inputs = _pad_left([prompt_ids[row] for row in rows] or [[0]], pad_id, model.device)
            width = inputs["input_ids"].shape[1]

            def stopped(ids: Tensor, _: Any = None, width: int = width, **__: Any) -> Tensor:
                done = [is_stopped(row) for row in ids[:, width:].tolist()]
                return torch.tensor(done, device=ids.device)

            synced = any_left is not None
            if generates:
                ids = model.generate(
                    **inputs,
                    generation_config=config,
                    stopping_criteria=[stopped],
                    synced_gpus=synced,
                )
            else:
                ids = _continued(model, inputs["input_ids"], config, stopped, synced)
            yield from zip(rows, ids[:, width:].tolist(), strict=False)


def generates_exactly(model: Any) -> tuple[bool, bool]:
    """Whether ``generate`` answers as the model alone does: padded on the left, and unpadded."""
    pads = passes_trial(model, _padded)
    return pads, pads or passes_trial(model, _unpadded)


@torch.no_grad()
def _continued(
    model: Any, ids: Tensor, config: Any, stopped: Callable[[Tensor], Tensor], synced: bool
) -> Tensor:
    ends = torch.tensor(config.eos_token_id or [], device=ids.device)
    is_done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(config.max_new_tokens):
        new = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, new[:, None]], dim=1)
        is_done |= torch.isin(new, ends) | stopped(ids)
        if is_done.all() and not synced:
            break
    return ids


def _greedy_config(max_new_tokens: int, eos_ids: Sequence[int], pad_id: int) -> Any:
    from transformers import GenerationConfig

    new_config: Any = GenerationConfig  # its constructor is untyped
    return new_config(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
    )


@contextmanager
def _configured(model: Any, config: Any) -> Iterator[None]:
    """Handing the configuration to ``generate`` is not enough: the model's own fills its gaps."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _pad_left(
    prompt_ids: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    width = max(len(ids) for ids in prompt_ids)
    input_ids = [[pad_id] * (width - len(ids)) + [*ids] for ids in prompt_ids]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _padded(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """A way of :func:`~lwf_lightning.trial.passes_trial`."""
    config = _greedy_config(2, (), 0)
    inputs = _pad_left(prompts, 0, model.device)
    with _configured(model, config):
        found = model.generate(
            **inputs, generation_config=config, output_logits=True, return_dict_in_generate=True
        )
    answers = found.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    read = [[*ids, answer[0]] for ids, answer in zip(prompts, answers, strict=True)]
    return read, torch.stack(found.logits, dim=1)


def _unpadded(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """The same for prompts of equal length."""
    return _padded(model, [ids[-3:] for ids in prompts])
