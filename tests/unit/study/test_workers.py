"""One run's end is not the study's."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lwf_lightning.study import workers
from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.results import append_record
from lwf_lightning.study.workers import perform_all, perform_once, results_file


class Named(Run):
    """A run of a given name; a worker that asks for it is ended, or does not end by itself."""

    @property
    def identity(self) -> str:
        in_worker = multiprocessing.parent_process() is not None
        if in_worker and self.method == "killed":
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
        if in_worker and self.method == "left":
            os._exit(3)
        if in_worker and self.method == "serverless":
            os._exit(255)  # as Python tells of a process whose forkserver is gone
        if in_worker and self.method == "c":
            os.kill(os.getpid(), signal.SIGINT)  # as a terminal does to all processes
        if in_worker and self.method == "endless":
            with Path(self.config["told"]).open("wb", buffering=0) as pipe:
                pipe.write(b"at work")
                signal.pause()
        return self.method


@pytest.fixture
def study(tmp_path: Path) -> Study:
    methods = {"vanilla": Method()}
    return Study("small", "none.yaml", methods, {"a": {}}, [0], output=str(tmp_path))


def named(name: str, **config: str) -> Run:
    return Named("comparison", ("a",), name, 0, {}, config)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are there sooner, and the environment as it was."""
    monkeypatch.setattr(workers, "_IMPORTED", workers._IMPORTED[:1])
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_worker_that_is_ended_fails_its_own_run_alone(study: Study, at_a_time: int) -> None:
    names = ["a", "killed", "b", "left", "serverless", "c"]
    for name in "abc":
        append_record(results_file(study), {"run": name})
    told: dict[str, str] = {}

    def tell(run: Run, outcome: str) -> None:
        assert run.method not in told
        told[run.method] = outcome

    perform_all(study, [named(name) for name in names], workers=at_a_time, threads=1, told=tell)
    assert {told.pop(name) for name in "abc"} == {"recorded"}
    assert told.pop("killed").startswith("failed: its process was ended by signal 9")
    assert told.pop("left").startswith("failed: its process ended with exit code 3")
    assert "ended the server of the workers" in told.pop("serverless")
    assert not told


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    return path


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell has what it starts in the background ignore SIGINT."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("light", "heeds_ctrl_c")
@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_the_workers_too(
    study: Study, pipe: str, number: signal.Signals, ends: type[BaseException]
) -> None:
    append_record(results_file(study), {"run": "a"})
    usual = signal.getsignal(signal.SIGTERM)
    runs = [named("endless", told=pipe), named("a")]
    with pytest.raises(ends) as stop:
        perform_all(study, runs, workers=2, threads=1, told=lambda *_: os.kill(os.getpid(), number))
    if isinstance(stop.value, SystemExit):
        assert stop.value.code == 128 + number
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) == usual


def test_workers_end_with_the_process_that_started_them(study: Study, pipe: str) -> None:
    source = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import *
workers._IMPORTED = workers._IMPORTED[:1]
methods = {{"vanilla": Method()}}
study = Study("small", "none.yaml", methods, {{"a": {{}}}}, [0], output={study.output!r})
perform_all(study, [named("endless", told={pipe!r})], workers=1, threads=1, told=print)
"""
    parent = subprocess.Popen([sys.executable, "-c", source])
    with Path(pipe).open("rb", buffering=0) as told:
        assert told.read(7) == b"at work"
        parent.kill()
        parent.wait()
        assert select.select([told], [], [], 30)[0]  # or the worker would outlive its study
        assert told.read() == b""


def test_a_record_that_cannot_be_written_fails_its_run(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, record: Any) -> None:
        raise OSError("No space left on device")

    log = study.folder / "runs" / "a" / "version_0"
    (log / "checkpoints").mkdir(parents=True)
    record = {"run": "a", "folder": str(log.parent)}
    monkeypatch.setattr(workers, "perform", lambda study, run: record)
    with monkeypatch.context() as patched:
        patched.setattr(workers, "append_record", full)
        outcome = perform_once(study, named("a"))
    assert outcome.startswith("failed: OSError: No space left on device (see ")
    assert (log / "checkpoints").exists()  # so that it goes on from there
    assert perform_once(study, named("a")) == "done"
    assert not (log / "checkpoints").exists()


def test_no_workers_are_refused(study: Study) -> None:
    with pytest.raises(ValueError, match="--workers must be at least 1, got 0"):
        perform_all(study, [], workers=0, threads=1, told=lambda run, outcome: None)
