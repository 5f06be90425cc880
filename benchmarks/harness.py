"""What every benchmark here shares: ways that take turns, ratios of medians, one table.

A benchmark is a module of this folder with a function

    def results(*, quick: bool = False) -> Iterator[Result | Skipped]: ...

``python -m benchmarks`` finds it by that name. ``quick`` asks for a small version of the same
code, some seconds long, on what the package carries: its figures mean nothing, but it shows that
the benchmark still runs.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lwf_lightning.models import load_model, load_tokenizer

DATA = Path(os.environ.get("LWF_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
"""Folder of the real tasks, one folder each."""
MODEL, QUICK_MODEL = "smollm2-135m", "world-base"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        work: What was measured.
        compared_with: What it was measured against, in the same run.
        figure: The ratio of medians, or seconds or bytes where ``unit`` says so.
        bar: The limit that the figure is held against; None where there is none.
        better: Whether a good figure is at most or at least the bar.
        unit: What the figure counts.
        details: Whatever explains the figure: medians, sizes, settings.
    """

    work: str
    compared_with: str
    figure: float
    bar: float | None
    better: Literal["at most", "at least"] = "at most"
    unit: str = "x"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.bar is None:
            return None
        return self.figure <= self.bar if self.better == "at most" else self.figure >= self.bar

    def as_json(self) -> dict[str, Any]:
        """All fields and whether the bar is met."""
        return {**asdict(self), "met": self.is_met}


@dataclass(frozen=True)
class Skipped:
    """A line of the table that could not be measured here, and why."""

    work: str
    compared_with: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return {"work": self.work, "compared_with": self.compared_with, "skipped": self.reason}


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way over interleaved rounds: A B C, A B C, ...

    A busy machine slows all ways of a round alike, so that the ratio of medians holds.

    Args:
        ways: What is timed, by name; each call does the same work again.
        rounds: Timed rounds.
        warm_up: Rounds before, not timed.
        clock: Wall-clock time; ``time.process_time`` counts the seconds of all threads instead.
    """
    for _ in range(warm_up):
        for run in ways.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> float:
    """The median of the first divided by that of the second."""
    return median(first) / median(second)


def command_line(results: Callable[..., Iterable[Result | Skipped]], description: str) -> None:
    """Runs one benchmark by itself and prints its lines as they come.

    Args:
        results: The benchmark; each of its whole numbers becomes an option of the same name.
        description: Its first line is said by ``--help``.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    numbers = {
        name: parameter.default
        for name, parameter in inspect.signature(results).parameters.items()
        if type(parameter.default) is int
    }
    for name, default in (numbers | {"threads": torch.get_num_threads()}).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, help=f"instead of {default}")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    for result in results(**options):
        print(result.as_json(), flush=True)


class NotHere(Exception):
    """Data or weights that a benchmark needs are not on this machine: it is skipped."""


def need_data() -> None:
    """Raises :class:`NotHere` without the real tasks."""
    if not (DATA / "qasc").is_dir():
        raise NotHere(f"no data in {DATA}: set LWF_DATA_DIR")


def model_and_tokenizer(name: str = MODEL) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode; raises :class:`NotHere` where its weights are missing."""
    try:
        return load_model(name).eval(), load_tokenizer(name)
    except ValueError as error:
        raise NotHere(str(error)) from error


def resident() -> tuple[int, int]:
    """Highest resident set since it was last forgotten, and the present one, in bytes (Linux).

    Not from ``getrusage``, whose peak in a child process begins with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    peak, now = (re.search(rf"{key}:\s+(\d+) kB", status) for key in ("VmHWM", "VmRSS"))
    return int(peak[1]) * 1024, int(now[1]) * 1024  # type: ignore[index]
