"""Evaluation by choices with the prompt read once, beside one text per choice.

    python -m benchmarks.evaluation --threads 2

SmolLM2-135M scores the eight choices of qasc questions, 16 questions at a time. One text per choice
is grouped by length too, so that all of the difference is the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch

from benchmarks.harness import (
    DATA,
    MODEL,
    QUICK_MODEL,
    Result,
    command_line,
    model_and_tokenizer,
    need_data,
    ratio_of_medians,
    take_turns,
)
from lwf_lightning.data.evaluation import eval_items, eval_loader
from lwf_lightning.metrics import choice, choice_log_likelihoods
from lwf_lightning.ranks import Ranks
from lwf_lightning.tasks import get_task, load_rows

WORK, PLAIN = "evaluation by choices, qasc", "one text per choice"


def results(*, questions: int = 32, rounds: int = 3, quick: bool = False) -> Iterator[Result]:
    """One line: the time of shared prompts as a part of the other's."""
    if quick:
        questions, rounds = 2, 1
    else:
        need_data()
    model, tokenizer = model_and_tokenizer(QUICK_MODEL if quick else MODEL)
    task = get_task("world_learning" if quick else "qasc")
    examples = task.examples(list(load_rows(task, "validation", data_dir=DATA))[:questions])
    items = eval_items(tokenizer, examples, "choice", 512)
    loader = eval_loader(
        items, task=task.name, kind="choice", batch_size=16, pad_token_id=0, ranks=Ranks()
    )
    batches = [batch.batch for batch in loader]
    sums: dict[bool, torch.Tensor] = {}

    def score(shares: bool) -> None:
        with patch.object(choice, "shares_exactly", lambda *_: shares):
            sums[shares] = torch.cat([choice_log_likelihoods(model, b)[0] for b in batches])

    ways = {"shared": partial(score, True), "plain": partial(score, False)}
    seconds = take_turns(ways, rounds=rounds, warm_up=0 if quick else 1)
    difference = (sums[True] - sums[False]).abs() / sums[False].abs()
    details = {
        "questions": questions,
        "choices": len(sums[True]),
        "largest_relative_difference": float(difference.max()),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    figure = ratio_of_medians(seconds["shared"], seconds["plain"])
    yield Result(WORK, PLAIN, figure, bar=1.0, details=details)


if __name__ == "__main__":
    command_line(results, __doc__)
