"""``results.jsonl``: one line per finished run, written by any number of workers at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwf_lightning.files import locked


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
        file.seek(max(0, whole - 1))
        file.write((b"" if file.read() in (b"", b"\n") else b"\n") + line)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines but blank ones; the newest record of each run, in the order of the first.

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
        if not line.strip():
            continue
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
    """Bytes up to and with the last line end, or all if what follows it is a record.

    An editor may leave the end of the last line out; a record that was cut short is no JSON.
    """
    size = end = file.seek(0, os.SEEK_END)
    whole = 0
    while end > 0 and not whole:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        whole = start + found + 1 if found >= 0 else 0
        end = start
    file.seek(whole)
    try:
        return size if isinstance(json.loads(file.read()), dict) else whole
    except ValueError:
        return whole
