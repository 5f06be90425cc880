"""Gold answers that no generated answer can equal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwf_lightning.data.encode import answer_ids
from lwf_lightning.tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def warn_of_unreachable(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: int,
    chat_template: bool = False,
) -> None:
    """Counts, for evaluation by generation, gold answers that cannot count as right.

    Args:
        tokenizer: Tokenizer of the model.
        task: The task, which reads answers.
        examples: What is evaluated of it, with gold answers.
        max_new_tokens: Limit of a generated answer.
        chat_template: Whether answers are given in the tokenizer's chat template.
    """
    ids = [answer_ids(tokenizer, example, chat_template) for example in examples]
    said = [example.answer for example in examples]
    if tokenizer.eos_token is not None:  # else it is a stand-in for a tokenizer
        # As a generated answer is read: a tokenizer need not give back what it was given.
        said = [str(tokenizer.decode(own, skip_special_tokens=True)) for own in ids]
    unread = [
        e
        for e, text in zip(examples, said, strict=True)
        if not e.reference or task.read_answer(text) != e.reference
    ]
    if unread:
        warnings.warn(
            f"{len(unread)} of {len(examples)} gold answers of {task.name} can never count as "
            f"right: {unread[0].source} is the first. A generated answer is read up to a stop text "
            f"({list(task.stop)}), where it is a choice to the end of its line, and as the "
            "tokenizer gives it back, without special tokens; set `stop` in "
            "data.init_args.custom_tasks, or change the rows",
            stacklevel=2,
        )
    long = sum(len(own) > max_new_tokens for own in ids)
    if long:
        warnings.warn(
            f"{long} of {len(examples)} gold answers of {task.name} are longer than "
            f"data.init_args.max_new_tokens={max_new_tokens}, and are generated without their end; "
            "raise it",
            stacklevel=2,
        )
