"""Runs of the command line in processes that are killed at a given moment.

As a script: imports everything once, then forks a process for each run that it is asked for, one
JSON object per line. A moment is a number of Python calls since the start, so that it can be
anywhere and is the same each time, or the n-th call of a function, or some time.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

IMPORTED = (
    *("lwf_lightning.cli", "peft", "tensorboard.compat", "torch.utils.tensorboard"),
    "transformers.models.llama.modeling_llama",
)
SOURCE = Path(__file__).parents[2]


class Killable:
    """Asks the script for runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(
        self,
        cwd: Path,
        args: list[str],
        *,
        calls: int | None = None,
        function: str | None = None,
        count: int = 1,
        number: int = signal.SIGKILL,
        seconds: float | None = None,
        count_calls: bool = False,
        env: dict[str, str] | None = None,
    ) -> tuple[int, int]:
        """Runs the command line, and sends it a signal at the moment.

        Args:
            cwd: Where; its output goes to ``log`` there.
            args: Arguments of the command line.
            calls: The moment, as a number of calls.
            function: The moment, as the name of a function of the package, or of Lightning.
            count: Which call of the function.
            number: The signal.
            seconds: Another moment, after this time, whatever the process is doing; for SIGKILL.
            count_calls: Whether to count the calls.
            env: More of the environment.

        Returns:
            Exit status, negative for a signal; and the calls made, if it was not killed.
        """
        cwd.mkdir(parents=True, exist_ok=True)
        job = {
            **{"cwd": str(cwd), "args": args, "env": env or {}, "count_calls": count_calls},
            **{"calls": calls, "function": function, "count": count, "signal": int(number)},
            "seconds": seconds,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        made = cwd / "calls"
        return status, int(made.read_text()) if made.exists() else 0


@contextmanager
def killable() -> Iterator[Killable]:
    """The script, running."""
    env = os.environ | {
        **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": "0"},
    }
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=SOURCE,
    )
    try:
        yield Killable(process)
    finally:
        process.kill()
        process.wait()


def _child(job: dict[str, Any]) -> int:
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from lwf_lightning.cli import main

    made = seen = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal made, seen
        made += 1
        if made == job["calls"]:
            os.kill(os.getpid(), job["signal"])
        if frame.f_code.co_qualname == job["function"]:
            seen += 1
            if seen == job["count"]:
                sys.settrace(None)
                os.kill(os.getpid(), job["signal"])

    Path("calls").unlink(missing_ok=True)
    if job["count_calls"] or job["calls"] or job["function"]:
        sys.settrace(count)
    try:
        main(job["args"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.settrace(None)
    Path("calls").write_text(str(made))
    return status


def _serve() -> None:
    # What a run imports late. Nothing is computed before the fork: threads do not survive it.
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        if (pid := os.fork()) == 0:
            status = 99
            try:
                status = _child(job)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        timer = threading.Timer(job["seconds"] or 1e6, os.kill, (pid, signal.SIGKILL))
        timer.start()
        _, waited = os.waitpid(pid, 0)
        timer.cancel()
        timer.join()
        print(os.waitstatus_to_exitcode(waited), flush=True)


if __name__ == "__main__":
    _serve()
