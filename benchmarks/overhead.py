"""A run that unlearns beside a vanilla run of the same learning steps: what LWF costs.

    python -m benchmarks.overhead --threads 2               # a tenth of a refresh interval
    python -m benchmarks.overhead --threads 2 --parts 1     # all 200 learning steps of it
    python -m benchmarks.overhead --threads 2 --half        # a random model of 27 million

SmolLM2-135M learns qasc (16 texts a step) and unlearns what it says about psychology and dentistry:
online anchor, an unlearning step of 8 texts every 8 learning steps, and every 200 of them a refresh
over 256 learning texts (Fisher) and 256 texts of self-knowledge (scores), which are elicited before
the clock starts. A tenth of that, 20 steps with a refresh over 26 and 26 texts, has the same
shares; only what a refresh costs whatever its texts then weighs too much.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness import DATA, MODEL, QUICK_MODEL, Result, need_data
from benchmarks.training import StepEnds, half_width_model
from lwf_lightning import FisherCallback, LWFDataModule, LWFModule
from lwf_lightning.callbacks import fisher as refresh
from lwf_lightning.trainer import LWFTrainer

INTERVAL, STEPS, TEXTS = 8, 200, 256
WARM_UP = INTERVAL  # learning steps before the clock starts; the refresh is the first thing after
BAR = 1.3


@dataclass(frozen=True)
class Segment:
    """What is measured of a run."""

    steps: int = STEPS
    texts: int = TEXTS
    batch_size: int = 16
    learning_task: str = "qasc"
    forgetting_tasks: tuple[str, ...] = ("psychol", "dental")
    max_new_tokens: int = 16
    model: str = MODEL


class Parts:
    """Seconds spent in each part of the run: by the clock, and of processor time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

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


class OneRefresh(FisherCallback):
    """Refreshes when the clock starts, and only then."""

    def should_refresh(self, step: int) -> bool:
        """After the warm-up."""
        return step == WARM_UP


class Measured(StepEnds):
    """Starts the parts anew once the warm-up is over."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Notes the time."""
        super().on_train_batch_end(*arguments)
        if len(self.times.clock) == WARM_UP:
            self.parts.seconds.clear()


def run(segment: Segment, schedule: str) -> dict[str, list[float]]:
    """Seconds of each part of the segment, and of the ``whole`` of it."""
    parts = Parts()
    ends = Measured(parts)
    callbacks: list[Any] = [ends]
    if schedule != "never":
        callbacks.insert(0, OneRefresh("online", STEPS, fisher_texts=segment.texts))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        module = LWFModule(
            segment.model,
            schedule=schedule,
            unlearning_interval=INTERVAL,
            unlearning_ceiling=1e9,  # no text is spared: every unlearning step is a whole one
        )
        for owner, name, part in (
            (module, "_learn", "learning steps"),
            (module, "_unlearn", "unlearning steps"),
            (refresh, "diagonal_fisher", "Fisher"),
            (refresh, "forgetting_confidence", "scores"),
            (refresh, "write_tensors", "saving Fisher and anchor"),
        ):
            stack.enter_context(parts.times(owner, name, part))
        trainer = LWFTrainer(
            max_steps=WARM_UP + segment.steps,
            accelerator="cpu",
            callbacks=callbacks,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=_data(segment))
    moments = (ends.times.clock, ends.times.processor)
    whole = [seconds[-1] - seconds[WARM_UP - 1] for seconds in moments]
    named = list(parts.seconds.values())
    rest = [whole[i] - sum(seconds[i] for seconds in named) for i in range(2)]
    return {**parts.seconds, "everything else": rest, "whole": whole}


def _data(segment: Segment) -> LWFDataModule:
    return LWFDataModule(
        segment.learning_task,
        list(segment.forgetting_tasks),
        data_dir=str(DATA),
        batch_size=segment.batch_size,
        forgetting_prompts=segment.texts,
        max_new_tokens=segment.max_new_tokens,
        evaluate_forgetting=False,
    )


def results(
    *, segment: Segment | None = None, parts: int = 10, rounds: int = 2, quick: bool = False
) -> Iterator[Result]:
    """The whole, then each part as a share of the vanilla run."""
    if quick:
        tasks = {"learning_task": "world_learning", "forgetting_tasks": ("world_forgetting",)}
        segment, rounds = Segment(8, 4, 2, **tasks, max_new_tokens=4, model=QUICK_MODEL), 1
    else:
        need_data()
    if segment is None:
        segment = Segment(steps=STEPS // parts, texts=-(-TEXTS // parts))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    vanilla: list[dict[str, list[float]]] = []
    unlearning: list[dict[str, list[float]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            vanilla.append(run(segment, "never"))
            unlearning.append(run(segment, "periodic"))
    for part in ("whole", *(name for name in unlearning[0] if name != "whole")):
        clock, processor = (
            median(seconds[part][i] for seconds in unlearning)
            / median(seconds["whole"][i] for seconds in vanilla)
            for i in range(2)
        )
        work = f"LWF, {segment.steps} steps of {segment.learning_task}: {part}"
        details: dict[str, Any] = {"ratio_of_processor_time": processor}
        if part == "whole":
            details |= {**asdict(segment), "vanilla": vanilla, "lwf": unlearning}
        bar = BAR if part == "whole" else None
        yield Result(work, "vanilla run", clock, bar, details=details)


def main() -> None:
    """Prints the whole and its parts."""
    parser = argparse.ArgumentParser(description="What LWF costs beside a vanilla run.")
    parser.add_argument("--learning-task", default="qasc")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of a self-generated text")
    parser.add_argument("--parts", type=int, default=10, help="measure one of so many parts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--half", action="store_true", help="a model of 27 million parameters")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with half_width_model() if arguments.half else nullcontext(MODEL) as model:
        segment = Segment(
            STEPS // arguments.parts,
            -(-TEXTS // arguments.parts),
            arguments.batch_size,
            arguments.learning_task,
            max_new_tokens=arguments.max_new_tokens,
            model=model,
        )
        for result in results(segment=segment, rounds=arguments.rounds):
            processor = result.details["ratio_of_processor_time"]
            print(
                f"{result.work:<56}{result.figure:6.3f}, {processor:6.3f} in processor time",
                flush=True,
            )


if __name__ == "__main__":
    main()
