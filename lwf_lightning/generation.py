"""Greedy answers to many prompts: the same ones for any batch size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from lwf_lightning.modes import kept_modes
from lwf_lightning.shards import highest, mesh_of
from lwf_lightning.vocabulary import check_ids, padding_id

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedTokenizerBase


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every submodule is in the mode it was in before."""
    with kept_modes(model):
        model.eval()
        yield


def unwrapped(model: Any) -> Any:
    """The ``transformers`` model itself, LoRA layers in place, where PEFT wraps one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_adapter(model: Any) -> None:
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise TypeError(
            f"{adapter.peft_type} lies outside of the model's layers, and answers would be "
            "generated without it. Take LoRA, or ask get_base_model()"
        )


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a text, sorted: the generation config's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None}))


def positions_of(model: Any) -> int | None:
    """How many tokens a text may have, prompt and answer together; None without a limit."""
    positions: int | None = getattr(unwrapped(model).config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None  # XLNet's -1 stands for no limit


def steady_positions_of(model: Any) -> int | None:
    """Up to how many tokens a text's positions do not depend on the others of its batch.

    None if they never do. With ``longrope`` (Phi-3) and ``dynamic`` all texts of a batch are read
    by the rotary embedding of the longest.
    """
    config = unwrapped(model).config
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("longrope", "dynamic"):
            return part.get("original_max_position_embeddings") or positions_of(model)
    return None


def prompt_limit(model: Any, max_new_tokens: int, max_prompt_tokens: int | None) -> int | None:
    """How many tokens a prompt may have for its answer to fit the model; None without a limit.

    Args:
        model: A ``transformers`` causal LM, with or without a LoRA adapter.
        max_new_tokens: Upper limit of an answer's length in tokens.
        max_prompt_tokens: A lower limit than the model's, or None.

    Raises:
        ValueError: If no room is left for a prompt, or ``max_prompt_tokens`` is below 1.
    """
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
    positions = positions_of(model)
    if positions is None:
        return max_prompt_tokens
    if max_new_tokens >= positions:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model has "
            f"{positions} positions, set data.init_args.max_new_tokens well below that"
        )
    room = positions - max_new_tokens
    return room if max_prompt_tokens is None else min(room, max_prompt_tokens)


def keep_end(ids: tuple[int, ...], limit: int | None, bos: int | None) -> tuple[int, ...]:
    """The last ``limit`` tokens of a prompt; a leading begin-of-text token stays.

    Example:
        >>> keep_end((1, 5, 6, 7), limit=3, bos=1)
        (1, 6, 7)
    """
    if limit is None or len(ids) <= limit:
        return ids
    if ids[0] == bos and limit > 1:
        return ids[:1] + ids[len(ids) - limit + 1 :]
    return ids[len(ids) - limit :]


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    progress: bool = False,
    description: str = "Generating",
) -> list[tuple[int, ...]]:
    """Continues every prompt with the most probable token at each step.

    With weights that are sharded among processes each has prompts of its own, or none, and all make
    equally many forward passes.

    As soon as prompts are finished, others take their place in the batch
    (:func:`~lwf_lightning.decoding.decode`); models that this does not suit answer batch by batch
    (:func:`~lwf_lightning.fallback.answer_in_batches`). Sampling, penalties and beams of the
    model's own generation config are left aside; only its end-of-text ids count. Each answer is the
    one the prompt would get alone, up to ties within rounding.

    Args:
        model: A ``transformers`` causal LM, with or without a LoRA adapter. It generates in
            evaluation mode and is given back in the mode it was in.
        tokenizer: The model's tokenizer; it needs no pad token.
        prompt_ids: Token ids of each prompt, unpadded, at least one each.
        max_new_tokens: Upper limit of an answer's length in tokens.
        batch_size: Prompts generated together; fewer where prompt and answer exceed 512 tokens.
        stop: An answer ends before the first of these strings to appear in its decoded text.
        progress: Whether to show a progress bar, one step per prompt.
        description: What the bar says.

    Returns:
        The newly generated ids of each prompt, in the order of the prompts. The end-of-text id is
        kept if it was generated; nothing of a stop string is.

    Raises:
        TypeError: If an adapter puts a prefix before each text: the model is asked without it.
        ValueError: If a prompt or a stop string is empty, a number is below 1, or the model does
            not embed a prompt's ids.
    """
    from lwf_lightning.decoding import decode, decodes_exactly  # imports transformers: seconds
    from lwf_lightning.fallback import answer_in_batches

    _check(prompt_ids, max_new_tokens, batch_size, stop)
    _check_adapter(model)
    base = unwrapped(model)
    check_ids(prompt_ids, base, tokenizer, "the prompts")
    eos_ids = eos_token_ids(base, tokenizer)
    is_stopped = _stop_check(tokenizer, stop)
    pad_id = padding_id((tokenizer.pad_token_id, *eos_ids), base)
    longest = max((len(ids) for ids in prompt_ids), default=0)
    any_left: Callable[[bool], bool] | None = None
    if (mesh := mesh_of(model.parameters())) is not None:
        longest = highest(longest, mesh)
        any_left = partial(_any_left, mesh)
    answers: list[tuple[int, ...]] = [()] * len(prompt_ids)
    bar = tqdm(total=len(prompt_ids), desc=description, unit="prompt", disable=not progress)
    with bar, evaluation_mode(model):
        if decodes_exactly(base, longest + max_new_tokens):
            finished = decode(
                base,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                is_done=lambda ids: ids[-1] in eos_ids or is_stopped(ids),
                pad_id=pad_id,
                any_left=any_left or bool,
            )
        else:
            finished = answer_in_batches(
                base,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                eos_ids=eos_ids,
                is_stopped=is_stopped,
                pad_id=pad_id,
                any_left=any_left,
            )
        for row, ids in finished:
            answers[row] = _cut(ids, tokenizer, eos_ids, stop)
            bar.update()
    return answers


def _any_left(mesh: DeviceMesh, here: bool) -> bool:
    """Whether any process has work left: sharded weights need all of them at every pass."""
    return bool(highest(here, mesh))


def _check(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, stop: Sequence[str]
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a list of strings, none of them empty; got {stop!r}")
    for row, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt {row} has no tokens: there is nothing to continue")


def _stop_check(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]
) -> Callable[[Sequence[int]], bool]:
    """Whether the end of a growing answer holds a stop string.

    It only saves time; :func:`_cut` alone decides where an answer ends. A string of n bytes spans
    at most n tokens, so a short tail is decoded at each step.
    """
    if not stop:
        return lambda ids: False
    tail = max(len(string.encode()) for string in stop) + 1
    return lambda ids: _holds(_decode(tokenizer, ids[-tail:]), stop)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # Special tokens stay visible: a stop string may be one.
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(string in text for string in stop)


def _cut(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    stop: Sequence[str],
) -> tuple[int, ...]:
    """The ids up to and with the first end-of-text id, and without any part of a stop string."""
    end = next((place + 1 for place, token in enumerate(ids) if token in eos_ids), len(ids))
    ids = tuple(ids[:end])
    if not _holds(_decode(tokenizer, ids), stop):
        return ids
    sizes = range(len(ids) + 1)
    # The shortest prefix that holds a stop string: text after it depends on the batch.
    size = bisect_left(sizes, True, key=lambda n: _holds(_decode(tokenizer, ids[:n]), stop))
    text = _decode(tokenizer, ids[:size])
    place = min(text.find(string) for string in stop if string in text)
    longer = bisect_left(sizes, True, key=lambda n: len(_decode(tokenizer, ids[:n])) > place)
    return ids[: longer - 1]
