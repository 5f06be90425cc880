"""Elicitation beside ``generate`` in data order, eight prompts at a time.

    python -m benchmarks.elicitation --threads 2

SmolLM2-135M answers real prompts of the five tasks, mixed: a few tokens to nearly two hundred, with
answers between none and 64 tokens. Counted are the tokens that stay in the answers. Both ways end a
row at the same texts; ``generate`` has a criterion of ours for that, which is a little faster
than its own ``stop_strings``. Both give the same answers, up to ties within rounding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig

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
from lwf_lightning.data.encode import encode_prompt
from lwf_lightning.generation import _cut, _stop_check, eos_token_ids, generate_answers
from lwf_lightning.tasks import get_task, load_rows

TASKS = ("psychol", "dental", "qasc", "gsm8k", "sst5")
WORK, PLAIN = "elicitation, tokens per second", "generate in data order, batch 8"


def mixed_prompts(
    tokenizer: Any, per_task: int, tasks: Sequence[str] = TASKS
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Token ids of prompts of all tasks in random order, and the texts at which answers end."""
    order, ids, stop = random.Random(0), [], {}
    for name in tasks:
        task = get_task(name)
        rows = order.sample(list(load_rows(task, "train", data_dir=DATA)), per_task)
        ids += [encode_prompt(tokenizer, task.example(row).prompt) for row in rows]
        stop |= dict.fromkeys(task.stop)
    order.shuffle(ids)
    return ids, list(stop)


def in_data_order(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    stop: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[int, ...]]:
    """What anybody would write first: padded on the left, batch after batch."""
    eos_ids, is_stopped = eos_token_ids(model, tokenizer), _stop_check(tokenizer, stop)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(eos_ids), pad_token_id=0
    )
    model.generation_config = config  # else its own fills what is unset
    answers = []
    for start in range(0, len(prompts), batch_size):
        texts = prompts[start : start + batch_size]
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + [*text] for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])

        def stopped(ids: torch.Tensor, _: Any, width: int = width, **__: Any) -> torch.Tensor:
            return torch.tensor([is_stopped(row) for row in ids[:, width:].tolist()])

        generated = model.generate(
            ids, attention_mask=mask, generation_config=config, stopping_criteria=[stopped]
        )
        answers += [_cut(row, tokenizer, eos_ids, stop) for row in generated[:, width:].tolist()]
    return answers


def results(*, per_task: int = 8, rounds: int = 3, quick: bool = False) -> Iterator[Result]:
    """One line: how many times the tokens per second of ``generate``."""
    if quick:
        per_task, rounds, new, tasks = 4, 1, 4, ("world_forgetting",)
    else:
        need_data()
        new, tasks = 64, TASKS
    model, tokenizer = model_and_tokenizer(QUICK_MODEL if quick else MODEL)
    prompts, stop = mixed_prompts(tokenizer, per_task, tasks)
    answers: dict[str, list[tuple[int, ...]]] = {}
    processor: dict[str, list[float]] = {"plain": [], "ours": []}

    def timed(name: str, answer: Callable[..., list[tuple[int, ...]]], **settings: Any) -> None:
        start = time.process_time()
        answers[name] = answer(model, tokenizer, prompts, stop=stop, max_new_tokens=new, **settings)
        processor[name].append(time.process_time() - start)

    ways = {
        "plain": partial(timed, "plain", in_data_order, batch_size=8),
        "ours": partial(timed, "ours", generate_answers, batch_size=32),
    }
    in_data_order(
        model, tokenizer, prompts[:8], stop=stop, max_new_tokens=2, batch_size=8
    )  # warms both up
    seconds = take_turns(ways, rounds=rounds, warm_up=0)
    lengths = [len(answer) for answer in answers["plain"]]
    pairs = zip(answers["plain"], answers["ours"], strict=True)
    yield Result(
        WORK,
        PLAIN,
        ratio_of_medians(seconds["plain"], seconds["ours"])
        * sum(map(len, answers["ours"]))
        / sum(lengths),
        bar=2.0,
        better="at least",
        details={
            "prompts": len(prompts),
            "prompt_tokens": sum(map(len, prompts)),
            "answer_tokens": sum(lengths),
            "answers_that_differ": sum(a != b for a, b in pairs),
            "plain_tokens_per_second": round(sum(lengths) / median(seconds["plain"]), 1),
            "tokens_per_second": round(sum(lengths) / median(seconds["ours"]), 1),
            "seconds": seconds,
            "ratio_of_processor_time": ratio_of_medians(processor["plain"], processor["ours"]),
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    command_line(results, __doc__)
