"""Run folders on disk: whose they are, and the last whole checkpoint in them."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.utilities import rank_zero_warn

from lwf_lightning.checkpoint_io import check_whole, refusal_named
from lwf_lightning.errors import DamagedFileError
from lwf_lightning.files import whole_file, whole_folder
from lwf_lightning.fsdp2 import check_sharded

if TYPE_CHECKING:
    import lightning as L

_RUN_FILE = "run.json"
_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")
# What changes speed and memory only, or the place of a file: a run may go on with other values.
_FREE = {
    *("num_workers", "data_dir", "cache_dir", "eval_batch_size", "elicit_batch_size"),
    *("gradient_checkpointing", "tokens_per_pass", "max_skipped_steps", "trust_remote_code"),
}


def configuration(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None
) -> dict[str, Any]:
    """What tells one run from another.

    Seed, precision, what callbacks name as ``run_arguments``, and the classes and arguments of
    module and data, but for ``_FREE``.
    """
    values = {
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),  # where Lightning keeps it
        "trainer.precision": trainer.precision,
    }
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = f"trainer.callbacks.{type(callback).__name__}"
        for argument, value in getattr(callback, "run_arguments", {}).items():
            values[f"{name}.{argument}"] = value
    values["model.class_path"] = _class_path(module)
    values |= {f"model.init_args.{name}": value for name, value in module.hparams.items()}
    if datamodule is not None:
        values["data.class_path"] = _class_path(datamodule)
        arguments = {**datamodule.hparams, **_attributes(datamodule)}
        values |= {f"data.init_args.{name}": value for name, value in arguments.items()}
    kept = {key: value for key, value in values.items() if key.rsplit(".", 1)[-1] not in _FREE}
    return dict(json.loads(json.dumps(kept, default=_in_words, sort_keys=True)))


def _class_path(part: Any) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _attributes(datamodule: L.LightningDataModule) -> dict[str, Any]:
    """The attributes that an ``__init__`` of the class, or of one it derives from, takes."""
    takers = [inspect.signature(kind.__init__) for kind in type(datamodule).__mro__]  # type: ignore[misc]
    names = {name for taker in takers for name in taker.parameters}
    return {name: getattr(datamodule, name) for name in names if hasattr(datamodule, name)}


def _in_words(value: Any) -> str:
    """Without the address of an object that has no words of its own: it is another every time."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def folder_of(trainer: L.Trainer) -> Path | None:
    """The folder that a trainer writes to, to be asked for on all processes; None if to none.

    With a Trainer of Lightning's own it may hold what others wrote.
    """
    folder = trainer.log_dir or trainer.default_root_dir
    writes = not (trainer.fast_dev_run or trainer.barebones)  # type: ignore[attr-defined]
    return Path(folder) if writes else None


def is_new(folder: Path) -> bool:
    """Makes a folder; whether it was not there before.

    Raises:
        ValueError: If there is a file in its place.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder, where a run would be: remove it") from error
        return False
    return True


_HELD: dict[Path, TextIO] = {}
"""Claims of this process: closing a second file would give the first one's lock away."""


def claim(folder: Path) -> TextIO | None:
    """Keeps other processes from going on with a run, until what is returned is closed.

    The system closes it with the process, however that ends. None where there are no locks, as on
    Windows and some network file systems, and where this process has the run already.

    Raises:
        ValueError: If another process has the run.
    """
    try:
        import fcntl
    except ImportError:
        return None
    if (held := _HELD.get(folder)) is not None and not held.closed:
        return None
    file = (folder / ".lock").open("a", encoding="utf-8")
    try:  # unlike that of flock it is not held by workers of a process that is gone
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"--ckpt_path last: another process is training the run in {folder}: wait until it "
            "ends, or end it; a run beside it takes another trainer.default_root_dir"
        ) from None
    except OSError:
        file.close()
        return None
    _HELD[folder] = file
    return file


def begin_run(folder: Path, values: Mapping[str, Any], *, is_own: bool = False) -> bool:
    """Marks a run folder as that of a run with this configuration; a new one appears marked.

    Args:
        folder: The folder.
        values: What :func:`configuration` gave.
        is_own: Whether the run that may have begun there is this one.

    Returns:
        Whether the folder is this run's; else another run has begun there, maybe just now.

    Raises:
        ValueError: If there is a file in its place.
    """
    text = json.dumps(values, indent=1, sort_keys=True)
    if not folder.exists():
        try:
            with whole_folder(folder) as new:
                (new / _RUN_FILE).write_text(text, encoding="utf-8")
            return True
        except (OSError, ValueError):
            if not folder.exists():
                raise
    try:  # whoever marks first a folder that is there has it
        with whole_file(folder / _RUN_FILE, replaces=is_own) as file:
            file.write_text(text, encoding="utf-8")
    except FileExistsError:
        if not is_run(folder):
            raise ValueError(
                f"{folder} is in the way of a run's folder: remove it, or name another "
                "trainer.default_root_dir"
            ) from None
        return False
    return True


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / _RUN_FILE).is_file()


def runs_of(root: Path, values: Mapping[str, Any]) -> list[Path]:
    """The run folders of this configuration, newest first; newer ones of others are named.

    Args:
        root: ``trainer.default_root_dir``; its run folders are ``version_<n>``.
        values: What :func:`configuration` gave.
    """
    found, others = [], []
    for folder in _newest_first(root):
        # Runs of before noted no classes.
        theirs = {key: value for key, value in values.items() if key.endswith(".class_path")}
        theirs |= json.loads((folder / _RUN_FILE).read_text(encoding="utf-8"))
        if theirs == values:
            found.append(folder)
        elif not found:
            other = sorted(key for key in {*theirs, *values} if theirs.get(key) != values.get(key))
            others.append(f"{folder.name} (another {', '.join(other)})")
    if others:
        rank_zero_warn(f"newer runs in {root} are of other configurations: {'; '.join(others)}")
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints between two steps in a run folder, the last one first."""
    found = [
        (int(match.group(1)), path)
        for path in (folder / "checkpoints").glob("step-*.ckpt")
        if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def is_checkpoint_name(name: str) -> bool:
    """Whether a file of this name counts as one of StepCheckpoint's, old ones of which go.

    Example:
        >>> is_checkpoint_name("step-000100.ckpt"), is_checkpoint_name("epoch=0-step=100.ckpt")
        (True, False)
    """
    return _CHECKPOINT.fullmatch(name) is not None


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is not damaged; a damaged one is named in a warning.

    Returns:
        None if there is no checkpoint.

    Raises:
        DamagedFileError: If all that are there are damaged.
    """
    files = checkpoints(folder)
    for path in files:
        if is_whole(path):
            return path
    if files:
        raise DamagedFileError(
            f"all checkpoints in {folder / 'checkpoints'} are damaged: remove {folder} to begin "
            "the run anew"
        )
    return None


def require_checkpoint(path: str | Path) -> None:
    """Raises ``FileNotFoundError`` if a local checkpoint is not there; names the flag."""
    if _is_local_file_protocol(path) and not Path(path).exists():
        word = Path(path).name == str(path) and "." not in str(path)
        meant = "; the newest run's is last, any other is named by its file" if word else ""
        raise FileNotFoundError(f"--ckpt_path {path}: there is no such file or folder{meant}")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole; a damaged one is named in a warning."""
    try:
        file = _state_file(checkpoint)
        if not file.is_file():
            raise DamagedFileError(f"{checkpoint} is not whole: {file.name} is missing")
        check_whole(file)
        if checkpoint.is_dir():
            check_sharded(checkpoint)
    except DamagedFileError as error:
        rank_zero_warn(f"{error}: an earlier one is looked for")
        return False
    return True


def run_state(checkpoint: Path) -> dict[str, Any]:
    """What StepCheckpoint noted about the run: its folder, the step, and where its logs were.

    Empty for a checkpoint that was saved without it.

    Raises:
        DamagedFileError: If it holds more than tensors and primitives.
    """
    file = _state_file(checkpoint)
    with refusal_named(file):
        content = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    return dict(content.get("run", {}))


def _state_file(checkpoint: Path) -> Path:
    """The file with all but the shards; of a sharded checkpoint, Lightning writes it last."""
    return checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint


def _newest_first(root: Path) -> Iterator[Path]:
    numbered = {
        int(folder.name.removeprefix("version_")): folder
        for folder in root.glob("version_*")
        if re.fullmatch(r"version_\d+", folder.name) and is_run(folder)
    }
    yield from (numbered[number] for number in sorted(numbered, reverse=True))
