"""Seconds until the command line answers: each a median over fresh processes that take turns.

python -m benchmarks.startup
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.harness import Result, command_line, take_turns

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "import lwf_lightning": (["-c", "import lwf_lightning"], 1.0),
    "cli.py --help": (["cli.py", "--help"], 2.0),
    "cli.py with a wrong subcommand": (["cli.py", "fitt"], 2.0),
    "cli.py fit --help": (["cli.py", "fit", "--help"], 15.0),
}
"""What is run, and its bar in seconds."""


def results(*, rounds: int = 3, quick: bool = False) -> Iterator[Result]:
    """One line per command."""
    commands = {name: (how, bar) for name, (how, bar) in COMMANDS.items() if bar < 5 or not quick}
    processor: dict[str, list[float]] = {name: [] for name in commands}

    def start(name: str) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        arguments = COMMANDS[name][0]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode != (2 if "wrong" in name else 0):
            raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        processor[name].append(round(used, 3))

    ways = {name: partial(start, name) for name in commands}
    seconds = take_turns(ways, rounds=1 if quick else rounds, warm_up=0 if quick else 1)
    for name, (_, bar) in commands.items():
        details = {"seconds": seconds[name], "processor_seconds": processor[name]}
        yield Result(name, "the bar", median(seconds[name]), bar, unit="s", details=details)


if __name__ == "__main__":
    command_line(results, __doc__)
