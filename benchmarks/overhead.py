"""A run that unlearns beside a vanilla run of the same learning steps: what LWF costs.

    python -m benchmarks.overhead                             # qasc and gsm8k, a share of each
    python -m benchmarks.overhead --learning-task qasc --parts 1     # a whole refresh interval
    python -m benchmarks.overhead --model smollm2-135m --parts 25

A random model of 27 million parameters learns 16 texts a step and unlearns what it says about
psychology and dentistry: online anchor, an unlearning step of 8 texts every 8 learning steps, and
every 200 of them a refresh over 64 learning texts (Fisher) and 256 texts of self-knowledge
(scores), which are elicited before the clock starts.

What LWF costs is 1 and what it adds to the learning steps, the pull to the base weights among it.
The steps without it are the same in both runs: timed by themselves they differ by a tenth, since a
refresh has warmed the process up before. The runs take turns in being first.

A share of an interval, ``--parts 5``, takes a fifth of its steps and texts. What each step or text
takes is then counted five times, and once what a refresh takes whatever its texts: saving Fisher
and anchor, exchanging weights, choosing. With ``--parts 1`` nothing is reckoned.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeAlias
from unittest.mock import patch

import torch

from benchmarks.harness import DATA, QUICK_MODEL, Result, need_data
from benchmarks.training import StepEnds, half_width_model
from lwf_lightning import FisherCallback, LWFDataModule, LWFModule
from lwf_lightning.callbacks import fisher as refresh
from lwf_lightning.trainer import LWFTrainer

INTERVAL, STEPS, FORGET_BATCH = 8, 200, 8
TEXTS, FISHER_TEXTS = 256, 64  # to score, and behind the Fisher
WARM_UP = 1  # learning steps before the clock starts, with a refresh and an unlearning step
BAR = 1.3
PARTS = {"qasc": 5, "gsm8k": 25}  # of an interval, one is measured: a minute or two a round
LEARNING, UNLEARNING, FISHER, SCORES = "learning steps", "unlearning steps", "Fisher", "scores"
PULL, SAVING, REST = "pull to the base weights", "saving", "rest of the refresh"
ELSE, WHOLE = "everything else", "whole"
Seconds: TypeAlias = list[float]
"""By the clock, and of processor time."""
Run: TypeAlias = dict[str, Seconds]
"""Seconds by part."""


@dataclass(frozen=True)
class Segment:
    """What is measured of a run: one of ``parts`` of a refresh interval."""

    learning_task: str = "qasc"
    parts: int = 1
    model: str = QUICK_MODEL
    batch_size: int = 16
    fisher_batch_size: int = 8
    forgetting_tasks: tuple[str, ...] = ("psychol", "dental")
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if STEPS % self.parts or self.steps % INTERVAL:
            raise ValueError(f"parts must be 1, 5 or 25, got {self.parts}")

    @property
    def steps(self) -> int:
        """Learning steps."""
        return STEPS // self.parts

    @property
    def texts(self) -> int:
        """Texts to score, in whole batches."""
        return self._share(TEXTS)

    @property
    def fisher_texts(self) -> int:
        """Texts behind the Fisher, in whole batches."""
        return self._share(FISHER_TEXTS)

    def _share(self, texts: int) -> int:
        batches = -(-texts // self.fisher_batch_size // self.parts)
        return batches * self.fisher_batch_size

    @property
    def counted(self) -> dict[str, float]:
        """How often an interval takes what the segment takes once."""
        per_step = float(self.parts)
        return {
            **dict.fromkeys((LEARNING, PULL, UNLEARNING, ELSE), per_step),
            **{FISHER: FISHER_TEXTS / self.fisher_texts, SCORES: TEXTS / self.texts},
            **{SAVING: 1.0, REST: 1.0},
        }


class Parts:
    """Seconds spent in each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}

    @contextmanager
    def times(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Times each call of ``owner.name`` meanwhile."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = (time.perf_counter(), time.process_time())
            try:
                return original(*arguments, **options)
            finally:
                end = (time.perf_counter(), time.process_time())
                spent = self.seconds.setdefault(part, [0.0, 0.0])
                for i in range(2):
                    spent[i] += end[i] - start[i]

        with patch.object(owner, name, timed):
            yield


class TwoRefreshes(FisherCallback):
    """Refreshes to warm up, and when the clock starts."""

    def should_refresh(self, step: int) -> bool:
        """At the start, and after the warm-up."""
        return step in (0, WARM_UP)


class Measured(StepEnds):
    """Starts the parts anew once the warm-up is over."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        """Notes the time."""
        ends_warm_up = len(self.times.clock) + 1 == WARM_UP
        if ends_warm_up and module.schedule.unlearns:
            module._unlearn()  # the first one makes the moments of its optimizer
        super().on_train_batch_end(trainer, module, *arguments)
        if ends_warm_up:
            self.parts.seconds.clear()


def run(segment: Segment, schedule: str, cache: str) -> dict[str, Seconds]:
    """Seconds of each part in a whole refresh interval, and of the ``whole`` of it."""
    parts = Parts()
    ends = Measured(parts)
    module = LWFModule(
        segment.model,
        schedule=schedule,
        regularizer=None if schedule == "never" else "l2sp",
        unlearning_interval=INTERVAL,
        unlearning_ceiling=1e9,  # no text is spared: every unlearning step is a whole one
    )
    callback = TwoRefreshes(
        "online",
        STEPS,
        fisher_texts=segment.fisher_texts,
        batch_size=segment.fisher_batch_size,
        forgetting_rate=max(0.25, FORGET_BATCH / segment.texts),  # enough for a whole batch
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pulls = [(module.regularizer, "add_gradient", PULL)] if module.regularizer else []
        for owner, name, part in (
            *pulls,
            (module, "_learn", LEARNING),  # the pull as well, until it is taken off
            (module, "_unlearn", UNLEARNING),
            (refresh, "diagonal_fisher", FISHER),
            (refresh, "forgetting_confidence", SCORES),
            (refresh, "write_tensors", SAVING),
            (callback, "refresh", REST),  # all of it, until the others are taken off
        ):
            stack.enter_context(parts.times(owner, name, part))
        trainer = LWFTrainer(
            max_steps=WARM_UP + segment.steps,
            accelerator="cpu",
            callbacks=[ends] if schedule == "never" else [callback, ends],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=_data(segment, cache))
    moments = (ends.times.clock, ends.times.processor)
    whole = [seconds[-1] - seconds[WARM_UP - 1] for seconds in moments]
    found = parts.seconds
    if REST in found:
        found[REST] = _less(found[REST], [found[part] for part in (FISHER, SCORES, SAVING)])
    if PULL in found:
        found[LEARNING] = _less(found[LEARNING], [found[PULL]])
    found[ELSE] = _less(whole, list(found.values()))
    reckoned = {
        part: [segment.counted[part] * second for second in seconds]
        for part, seconds in found.items()
    }
    return {WHOLE: [sum(column) for column in zip(*reckoned.values(), strict=True)], **reckoned}


def _less(whole: Seconds, parts: list[Seconds]) -> Seconds:
    return [whole[i] - sum(seconds[i] for seconds in parts) for i in range(2)]


def _data(segment: Segment, cache: str) -> LWFDataModule:
    return LWFDataModule(
        segment.learning_task,
        list(segment.forgetting_tasks),
        data_dir=str(DATA),
        batch_size=segment.batch_size,
        forget_batch_size=FORGET_BATCH,
        forgetting_prompts=segment.texts,
        max_new_tokens=segment.max_new_tokens,
        evaluate_forgetting=False,
        cache_dir=cache,
    )


def results(*, rounds: int = 3, quick: bool = False) -> Iterator[Result]:
    """For each learning task the whole, then each part as a share of the vanilla run; then both."""
    if quick:
        tiny = Segment("world_learning", 25, QUICK_MODEL, 2, 2, ("world_forgetting",), 4)
        yield from compare(tiny, 1)
        return
    need_data()
    runs: list[tuple[list[Run], list[Run]]] = []
    with half_width_model() as model:
        for task, parts in PARTS.items():
            for result in compare(Segment(task, parts, model), rounds):
                if "lwf" in result.details:  # the whole
                    runs.append((result.details["vanilla"], result.details["lwf"]))
                yield result
    yield both(runs)


def both(runs: Sequence[tuple[Sequence[Run], Sequence[Run]]]) -> Result:
    """One interval of each learning task, one after the other: vanilla runs, and LWF's."""
    clock, processor = (
        1 + sum(_added(lwf, i) for _, lwf in runs) / sum(_whole(vanilla, i) for vanilla, _ in runs)
        for i in range(2)
    )
    details = {"ratio_of_processor_time": processor}
    return Result(
        f"LWF, {' and '.join(PARTS)}: {WHOLE}", "vanilla run", clock, BAR, details=details
    )


def compare(segment: Segment, rounds: int) -> Iterator[Result]:
    """The whole of a segment, then its parts."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    vanilla: list[Run] = []
    unlearning: list[Run] = []
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as cache:
        warnings.simplefilter("ignore")
        for number in range(rounds):
            both = [("never", vanilla), ("periodic", unlearning)]
            for schedule, runs in reversed(both) if number % 2 else both:
                runs.append(run(segment, schedule, cache))
    for part in unlearning[0]:
        clock, processor = (_share(part, i, unlearning, vanilla) for i in range(2))
        details: dict[str, Any] = {"ratio_of_processor_time": processor}
        if part == WHOLE:
            details |= {**asdict(segment), "vanilla": vanilla, "lwf": unlearning}
        yield Result(
            f"LWF, {segment.learning_task}: {part}",
            "vanilla run",
            clock,
            BAR if part == WHOLE else None,
            details=details,
        )


def _share(part: str, i: int, unlearning: Sequence[Run], vanilla: Sequence[Run]) -> float:
    """Of the vanilla run; of the whole 1 and what is added to the learning steps."""
    if part != WHOLE:
        return median(seconds[part][i] for seconds in unlearning) / _whole(vanilla, i)
    return 1 + _added(unlearning, i) / _whole(vanilla, i)


def _whole(vanilla: Sequence[Run], i: int) -> float:
    return median(seconds[WHOLE][i] for seconds in vanilla)


def _added(unlearning: Sequence[Run], i: int) -> float:
    """To the learning steps."""
    return median(seconds[WHOLE][i] - seconds[LEARNING][i] for seconds in unlearning)


def main() -> None:
    """Prints the whole and its parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning-task", nargs="+", default=list(PARTS))
    parser.add_argument("--parts", type=int, help="measure one of so many parts: 1, 5 or 25")
    parser.add_argument("--model", help="instead of the random one of 27 million parameters")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--fisher-batch-size", type=int, default=8, help="of Fisher and scores")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of a self-generated text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with half_width_model() if options.model is None else nullcontext(options.model) as model:
        for task in options.learning_task:
            segment = Segment(
                task,
                options.parts or PARTS.get(task, 1),
                model,
                options.batch_size,
                options.fisher_batch_size,
                max_new_tokens=options.max_new_tokens,
            )
            for result in compare(segment, options.rounds):
                processor = result.details["ratio_of_processor_time"]
                times = f"{result.figure:7.3f}, {processor:7.3f} in processor time"
                print(f"{result.work:<40}{times}", flush=True)


if __name__ == "__main__":
    main()
