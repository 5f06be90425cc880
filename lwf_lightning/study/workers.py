"""Workers: processes that take runs until none is left."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from lwf_lightning.files import locked
from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.perform import perform
from lwf_lightning.study.results import append_record, read_records

# What a run imports sooner or later; each process would otherwise do so by itself.
_IMPORTED = (
    "lwf_lightning.study.workers",
    "lwf_lightning.cli",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)


def results_file(study: Study) -> Path:
    """Where a study's records are."""
    return study.folder / "results.jsonl"


def perform_once(study: Study, run: Run) -> str:
    """Performs a run unless it is recorded or another worker, on any machine, is at it.

    What the run prints goes to ``output.txt`` in its folder.

    Returns:
        ``done``, ``recorded``, ``taken``, or what went wrong.
    """
    folder = study.folder / "runs" / run.identity
    with locked(folder / "claim.lock", wait=False) as held:
        if not held:
            return "taken"
        if any(record["run"] == run.identity for record in read_records(results_file(study))):
            return "recorded"
        with _output_to(folder / "output.txt"):
            try:
                record = perform(study, run)
            except (Exception, SystemExit) as error:  # one failed run must not end the study
                traceback.print_exc()
                return f"failed: {type(error).__name__}: {error} (see {folder / 'output.txt'})"
        append_record(results_file(study), record)
        return "done"


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


def perform_all(
    study: Study,
    runs: Sequence[Run],
    *,
    workers: int,
    threads: int,
    told: Callable[[Run, str], None],
) -> None:
    """Performs runs in fresh processes, several at a time.

    Args:
        study: The study.
        runs: What to perform.
        workers: Processes at a time.
        threads: Threads of each.
        told: Called with each run and the outcome of :func:`perform_once`, as they end.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, a clean process per run
    context.set_forkserver_preload(list(_IMPORTED))
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # of torch, and of tokenizers
        os.environ[name] = str(threads)
    pool = ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1)
    with pool:
        waiting: dict[Future[str], Run] = {
            pool.submit(perform_once, study, run): run for run in runs
        }
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                told(waiting.pop(future), future.result())
