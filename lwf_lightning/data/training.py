"""What a fit needs of its tasks: encoded learning texts, and the pool of forgetting prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwf_lightning.data.batch import EncodedText
from lwf_lightning.data.encode import encode_examples
from lwf_lightning.data.rows import DataError, Row
from lwf_lightning.data.sampler import even_shares, seeded_sample
from lwf_lightning.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def learning_texts(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    max_length: int,
    chat_template: bool,
) -> list[EncodedText]:
    """Encodes rows of the learning task; warns of answers that lose their end."""
    examples = task.examples(rows)
    texts, cut = encode_examples(tokenizer, examples, max_length, chat_template)
    if cut:
        warnings.warn(
            f"{cut} of {len(examples)} gold answers of {task.name} are longer than "
            f"data.init_args.max_length={max_length} leaves room for and lose their end",
            stacklevel=2,
        )
    return texts


def check_lengths(
    texts: Sequence[EncodedText], positions: int | None, task: str, max_length: int
) -> None:
    """Refuses learning texts that are longer than the model.

    Args:
        texts: The learning texts.
        positions: How many tokens a text may have; None without a limit.
        task: Name of the learning task.
        max_length: The limit that they were cut to.

    Raises:
        DataError: If one is longer; names the flag.
    """
    tokens = [len(text) for text in texts]
    if positions is not None and max(tokens, default=0) > positions:
        raise DataError(
            f"{sum(count > positions for count in tokens)} of {len(texts)} learning texts of "
            f"{task} are too long: they have up to {max(tokens)} tokens, more than the model's "
            f"{positions} positions; lower data.init_args.max_length={max_length} to that"
        )


def warn_of_unsteady(
    texts: Sequence[EncodedText], steady: int | None, task: str, max_length: int
) -> None:
    """Warns of learning texts whose length changes how others of their batch are read.

    Args:
        texts: The learning texts.
        steady: See :func:`~lwf_lightning.generation.steady_positions_of`.
        task: Name of the learning task.
        max_length: The limit that they were cut to.
    """
    longest = max(map(len, texts), default=0)
    if steady is not None and longest > steady:
        warnings.warn(
            f"learning texts of {task} have up to {longest} tokens. Beyond {steady} the rotary "
            "embedding of this model depends on the longest text of a batch, and so do losses, "
            f"Fisher and scores: lower data.init_args.max_length={max_length} to {steady}",
            stacklevel=2,
        )


def pooled_prompts(
    tasks: Sequence[Task], pools: Sequence[Sequence[Row]], limit: int | None, seed: int
) -> list[tuple[str, Example]]:
    """The forgetting prompts of all tasks, each with the name of its task.

    Args:
        tasks: The forgetting tasks.
        pools: The rows of each.
        limit: Prompts in all, spread evenly among the tasks; None takes every row.
        seed: Seed of the choice under a limit.
    """
    sizes = [len(rows) for rows in pools]
    shares = sizes if limit is None else even_shares(sizes, limit)
    return [
        (task.name, task.example(row))
        for task, rows, share in zip(tasks, pools, shares, strict=True)
        for row in seeded_sample(rows, share, seed)
    ]
