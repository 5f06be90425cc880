"""Gold answers that no generated answer can equal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwf_lightning.data.encode import answer_length
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
    unread = [e for e in examples if not e.reference or task.read_answer(e.answer) != e.reference]
    if unread:
        warnings.warn(
            f"{len(unread)} of {len(examples)} gold answers of {task.name} can never count as "
            f"right: {unread[0].source} is the first. A generated answer is read up to a stop text "
            f"({list(task.stop)}), and where it is a choice to the end of its line; set `stop` in "
            "data.init_args.custom_tasks, or change the rows",
            stacklevel=2,
        )
    long = sum(answer_length(tokenizer, e, chat_template) > max_new_tokens for e in examples)
    if long:
        warnings.warn(
            f"{long} of {len(examples)} gold answers of {task.name} are longer than "
            f"data.init_args.max_new_tokens={max_new_tokens}, and are generated without their end; "
            "raise it",
            stacklevel=2,
        )
