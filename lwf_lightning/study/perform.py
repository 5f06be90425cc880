"""One run of a study: an ordinary fit, then its test, then a line of results."""

from __future__ import annotations

import csv
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.files import whole_file
from lwf_lightning.study.config import VALIDATED, Study
from lwf_lightning.study.data_files import data_digests
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.overlay import looked_up, overlaid
from lwf_lightning.study.planted import found_figures
from lwf_lightning.study.validated import untrained

_PACKAGES = ("lwf-lightning", "torch", "lightning", "transformers")


def perform(study: Study, run: Run) -> dict[str, Any]:
    """Fits and tests, in this process; a run that was interrupted goes on where it was.

    Its checkpoints stay until :func:`remove_checkpoints`.

    Args:
        study: The study.
        run: One of its runs.

    Returns:
        The record: what was run and how, figures of the test split, curves of the validation
        split, ``area`` and ``precision`` where knowledge was planted, digests of the data files,
        whether the fit went on from a checkpoint, and of this process the seconds of the fit and
        the most memory that it held during the run, in bytes: of a resumed run those of its last
        part alone. A run that diverged has neither figures nor curves, but ``diverged``.

    Raises:
        ValueError: If the fit of a trial logged no validation figure to choose by, or none after
            its first step, or the test not the figure that is compared.
    """
    from lwf_lightning.cli import main as command_line

    file = write_config(study, run)
    forget_peak_memory()
    start = time.perf_counter()
    try:
        cli = command_line(["fit", "--config", str(file), "--ckpt_path", "last"])
    except SystemExit as stop:
        if isinstance(stop.__context__, NonFiniteLossError):
            return _diverged(study, run, file, stop.__context__, time.perf_counter() - start)
        raise
    seconds = time.perf_counter() - start
    resumed = cli.trainer.ckpt_path is not None  # asked before the test, which takes none
    cli.datamodule.evaluate_forgetting = False  # the fit's validation has told of those
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = cli.trainer.callback_metrics.items()
    figures = {name: float(value) for name, value in metrics if name.startswith("test/")}
    log = Path(str(cli.trainer.log_dir))
    curves = read_curves(log / "metrics.csv", VALIDATED)
    chosen_by, steps = study.validation_figure, cli.trainer.global_step
    if study.figure not in figures:
        raise ValueError(
            f"figure: the test of {run.identity} measured no {study.figure}, only "
            + ", ".join(sorted(figures))
        )
    if run.stage == "tuning":
        if chosen_by not in curves:
            raise ValueError(f"{file}: the fit validated nothing named {chosen_by}")
        if curves[chosen_by][0][-1] == 0 < steps:
            raise ValueError(untrained(run, steps))
    return {
        **_described(study, run, file),
        "log": str(log),
        "figures": figures,
        "curves": curves,
        **found_figures(study, log),
        "planted": None if study.planted is None else asdict(study.planted),
        "data": data_digests(cli.datamodule),
        "resumed": resumed,
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }


def _diverged(
    study: Study, run: Run, file: Path, error: BaseException, seconds: float
) -> dict[str, Any]:
    """The record of a run that diverged: it would do so again."""
    return {
        **_described(study, run, file),
        "log": str(file.parent),
        "figures": {},
        "curves": {},
        "diverged": str(error),
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }


def remove_checkpoints(record: Mapping[str, Any]) -> None:
    """Removes those of a run that is recorded: its configuration makes them again."""
    for checkpoints in Path(record["folder"]).glob("*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)


def _described(study: Study, run: Run, file: Path) -> dict[str, Any]:
    """What was run, and with what."""
    return {
        "run": run.identity,
        "study": study.name,
        "stage": run.stage,
        "cells": list(run.cells),
        "method": run.method,
        "seed": run.seed,
        "setting": dict(run.setting),
        "command": shlex.join(["python", "cli.py", "fit", "--config", str(file)]),
        "folder": str(file.parent),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
    }


def write_config(study: Study, run: Run) -> Path:
    """Writes the run's configuration into its folder and returns the file."""
    folder = study.folder / "runs" / run.identity
    file = folder / "run.yaml"
    config = overlaid(run.config, {"trainer.default_root_dir": str(folder)})
    with suppress(ValueError):  # where there is none
        if callback := looked_up(config, "trainer.callbacks.FisherCallback"):
            _share(study, callback.setdefault("init_args", {}))
    with whole_file(file) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def _share(study: Study, arguments: dict[str, Any]) -> None:
    """Has runs share their probes, and keep no Fisher, unless the study says otherwise."""
    if arguments.get("anchor", "probe") == "probe":
        arguments.setdefault("probe_folder", str(study.folder / "shared" / "probes"))
    arguments.setdefault("save_tensors", False)


def read_curves(path: Path, prefixes: tuple[str, ...]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of the figures of ``metrics.csv`` whose names begin in a given way.

    Raises:
        ValueError: If the run logged none.
    """
    if not path.exists():
        raise ValueError(
            f"trainer.logger: the run wrote no {path}, which a study reads: leave the logger out"
        )
    curves: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name.startswith(prefixes):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(float(row["step"])))
                    values.append(float(value))
    return curves


def forget_peak_memory() -> None:
    """Has :func:`peak_memory` begin anew, where the system can (Linux, CUDA)."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The most memory that this process has held since it was last forgotten, in bytes.

    Once it works on a GPU, what torch has allocated there.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def commit() -> str | None:
    """The commit of the checkout that the package lies in, ``-dirty`` with changes; or None."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:  # there is no git here
        return None
    return found.stdout.strip() or None
