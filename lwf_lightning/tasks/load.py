"""Rows of a task, from local files or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from lwf_lightning.data.rows import DataError, Row, Split, task_rows
from lwf_lightning.tasks.base import Task
from lwf_lightning.tasks.hub import hub_rows

Source: TypeAlias = Literal["local", "hub"]


def load_rows(
    task: Task,
    split: Split,
    *,
    data_dir: str | Path | None = None,
    source: Source = "local",
) -> list[Row]:
    """Loads one split of a task.

    Args:
        task: A task with its own folder is read from there, whatever ``source`` says.
        split: ``train``, ``validation`` or ``test``.
        data_dir: Folder that holds one folder per task, for local files.
        source: ``local`` JSONL files or the Hugging Face ``hub``.

    Raises:
        DataError: If files are missing or malformed, or no folder is given; names file and flag.
    """
    if task.folder is not None:
        return task_rows(task.folder, split)
    if source == "hub":
        return hub_rows(task.name, split)
    if data_dir is None:
        raise DataError(
            f"task {task.name!r} needs its files: set data.init_args.data_dir to the folder that "
            f"holds {task.name}/{split}.jsonl, or data.init_args.source to hub"
        )
    return task_rows(Path(data_dir).expanduser() / task.name, split)
