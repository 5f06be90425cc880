"""Workers: processes that take runs until none is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from threading import Thread

from lwf_lightning.cli_errors import one_line
from lwf_lightning.files import locked
from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.perform import perform, remove_checkpoints
from lwf_lightning.study.results import append_record, read_records

# What a run imports sooner or later; each process would otherwise do so by itself.
_IMPORTED = (
    "lwf_lightning.study.workers",
    "lwf_lightning.cli",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)

_SERVER_GONE = 255  # what Python tells of a process whose forkserver is no longer there


def results_file(study: Study) -> Path:
    """Where a study's records are."""
    return study.folder / "results.jsonl"


def _output_file(study: Study, run: Run) -> Path:
    return study.folder / "runs" / run.identity / "output.txt"


def perform_once(study: Study, run: Run) -> str:
    """Performs a run unless it is recorded or another worker, on any machine, is at it.

    What the run prints goes to ``output.txt`` in its folder.

    Returns:
        ``done``, ``diverged`` (recorded, too), ``recorded``, ``taken``, or what went
        wrong.
    """
    output = _output_file(study, run)
    with locked(output.with_name("claim.lock"), wait=False) as held:
        if not held:
            return "taken"
        if any(record["run"] == run.identity for record in read_records(results_file(study))):
            return "recorded"
        with _output_to(output):
            try:
                record = perform(study, run)
                append_record(results_file(study), record)
                remove_checkpoints(record)  # not before: what fails meanwhile must lose nothing
            except (Exception, SystemExit) as error:  # one failed run must not end the study
                traceback.print_exc()
                return f"failed: {_cause(error)} (see {output})"
        return "diverged" if "diverged" in record else "done"


def _cause(error: BaseException) -> str:
    """What went wrong; the command line has turned its errors into a line and an exit."""
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        return "ended by SIGTERM; started again it goes on from its checkpoint"
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        return "interrupted; started again it goes on from its last checkpoint"
    if isinstance(error, SystemExit) and error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {one_line(str(error))}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends what this process prints to a file, whatever prints it."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, own in zip((1, 2), kept, strict=True):
                os.dup2(own, number)
                os.close(own)


def check_counts(workers: int, threads: int) -> None:
    """Raises ``ValueError``, naming the flag, unless there is at least one of each."""
    for flag, count in (("workers", workers), ("threads", threads)):
        if count < 1:
            raise ValueError(f"--{flag} must be at least 1, got {count}")


def limit_threads(threads: int) -> None:
    """Has this process, and those that it starts, take no more threads."""
    import torch  # has read the environment by now

    _tell_threads(threads)
    torch.set_num_threads(threads)


def _tell_threads(threads: int) -> None:
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # of torch, and of tokenizers
        os.environ[name] = str(threads)


def perform_all(
    study: Study,
    runs: Sequence[Run],
    *,
    workers: int,
    threads: int,
    told: Callable[[Run, str], None],
) -> None:
    """Performs runs, each in a process of its own, several at a time.

    A process that the system ends, for lack of memory perhaps, fails its own run alone. When this
    process leaves, by SIGTERM for instance, its workers do: a fit saves before, and can go on.

    Args:
        study: The study.
        runs: What to perform.
        workers: Processes at a time.
        threads: Threads of each.
        told: Called with each run and the outcome of :func:`perform_once`, as they end.

    Raises:
        ValueError: If there are no workers, or no threads.
    """
    check_counts(workers, threads)
    context = multiprocessing.get_context("forkserver")  # imports once, a clean process per run
    context.set_forkserver_preload(list(_IMPORTED))
    _tell_threads(threads)
    waiting = iter(runs)
    at_work: dict[Connection, tuple[Run, ForkServerProcess]] = {}
    with _ended_together(at_work):
        while True:
            for run in islice(waiting, workers - len(at_work)):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_outcome, args=(study, run, sender))
                _start_server()
                process.start()
                sender.close()  # the only one is the process's now, so that receiving ends with it
                at_work[receiver] = run, process
            if not at_work:
                return
            ready = wait(list(at_work))
            for receiver in [receiver for receiver in at_work if receiver in ready]:
                run, process = at_work.pop(receiver)
                with receiver:
                    outcome = _outcome(receiver)
                process.join()
                told(run, outcome or f"failed: {_end_of(process)} (see {_output_file(study, run)})")


def _start_server() -> None:
    """Starts the server of the workers where there is none, to ignore Ctrl-C, as they do with it.

    A terminal sends it to all; workers are ended by SIGTERM then, before which a fit saves.
    """
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ensure_running()
    finally:
        signal.signal(signal.SIGINT, usual or signal.SIG_DFL)  # None: not set by Python


@contextmanager
def _ended_together(at_work: Mapping[Connection, tuple[Run, ForkServerProcess]]) -> Iterator[None]:
    """Has SIGTERM leave the block, and whatever leaves it end the processes at work."""
    usual = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for _, process in at_work.values():
            process.terminate()
        for _, process in at_work.values():
            process.join()
        signal.signal(signal.SIGTERM, usual)


def _send_outcome(study: Study, run: Run, sender: Connection) -> None:
    Thread(target=_leave_with_parent, daemon=True).start()
    sender.send(perform_once(study, run))


def _leave_with_parent() -> None:
    """Ends this process as SIGTERM does once the one that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _outcome(receiver: Connection) -> str | None:
    """What a worker tells in the end; None if it ended before."""
    try:
        return str(receiver.recv())
    except (EOFError, OSError):  # before it said anything, or in the middle
        return None


def _end_of(process: ForkServerProcess) -> str:
    code = process.exitcode or 0
    if code == _SERVER_GONE:
        return (
            f"its process ended with exit code {code}, as it does when the system has ended the "
            "server of the workers, perhaps for lack of memory; start the study again"
        )
    if code >= 0:
        return f"its process ended with exit code {code}"
    why = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
    return f"its process was ended by signal {-code}, {signal.strsignal(-code)}{why}"
