"""``results.jsonl``: one line per finished run, written by any number of workers at once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file; the system lets go of it when the process ends, however it ends.

    Args:
        path: The lock file; it is made and stays.
        wait: Whether to wait for the lock; else an unavailable one is not taken.

    Yields:
        Whether the lock is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line, whole: a line that a crash cut short is removed first.

    Args:
        path: The results file; its folder is made.
        record: Primitives by name.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with locked(path.with_suffix(".lock")), path.open("ab+") as file:
        whole = _whole_length(file)
        file.truncate(whole)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the newest record of each run, in the order of their first lines.

    Raises:
        ValueError: If a line in the middle is damaged; names file and line.
    """
    if not path.exists():
        return []
    records: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        whole = _whole_length(file)
        file.seek(0)
        lines = file.read(whole).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["run"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is damaged ({error}); remove the line, and its run will "
                "be done again"
            ) from error
    return list(records.values())


def _whole_length(file: Any) -> int:
    """Bytes up to and with the last line end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0
