"""Whether the data that recorded runs were made with still lies there as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lwf_lightning.named import first_of
from lwf_lightning.study.matrix import Record

if TYPE_CHECKING:
    from lwf_lightning.datamodule import LWFDataModule

_SPLITS = ("train", "validation", "test")


def data_digests(data: LWFDataModule) -> dict[str, str]:
    """The local files of a run's tasks and a digest of each; of tasks of the Hub there are none.

    Files below the current folder are named from there: records outlive a move of it.
    """
    folders = [task.folder for task in data.tasks.values() if task.folder is not None]
    if data.source == "local" and data.data_dir is not None:
        own = [name for name, task in data.tasks.items() if task.folder is None]
        folders += [Path(data.data_dir) / name for name in own]
    files = (
        Path(folder).expanduser() / f"{split}.jsonl" for folder in folders for split in _SPLITS
    )
    return {str(_from_here(file)): _digest(file) for file in files if file.is_file()}


def told_of_changed(records: Iterable[Record]) -> list[str]:
    """A warning if records were made with data files that are others now; none otherwise.

    Records of before have no digests, and files that are not there now are left out.
    """
    digest = cache(lambda name: _digest(Path(name)) if Path(name).is_file() else None)
    changed: dict[str, list[str]] = {}
    for record in records:
        known: Mapping[str, str] = record.get("data", {})
        if names := [name for name, then in known.items() if digest(name) not in (then, None)]:
            changed[record["run"]] = names
    if not changed:
        return []
    files = ", ".join(dict.fromkeys(name for names in changed.values() for name in names))
    return [
        f"Warning: {files} changed since {len(changed)} runs were recorded, which still count: "
        f"{first_of(list(changed))}. To do them again remove their lines from results.jsonl"
    ]


def _from_here(file: Path) -> Path:
    here = Path.cwd()
    return file.relative_to(here) if file.is_relative_to(here) else file


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
