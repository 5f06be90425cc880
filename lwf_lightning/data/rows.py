"""Rows of JSONL files, with errors that name file, row and field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "validation", "test"]


class DataError(ValueError):
    """Data that cannot be used; the message names where it is and what to do."""


class MissingFileError(DataError):
    """A split without a file."""


@dataclass(frozen=True)
class Row:
    """One row of a data set, whose fields are checked as they are read.

    Attributes:
        fields: The JSON object.
        source: Where the row stands, as in ``qasc/train.jsonl:row 12``; the first row is 1.

    Example:
        >>> row = Row({"question": "Who?", "label": 3}, "train.jsonl:row 1")
        >>> row.text("question")
        'Who?'
        >>> row.index("label", below=2)
        Traceback (most recent call last):
            ...
        lwf_lightning.data.rows.DataError: train.jsonl:row 1: field 'label' must be 0 to 1, got 3
    """

    fields: Mapping[str, object]
    source: str

    def text(self, field: str) -> str:
        """The field's text without surrounding whitespace.

        Raises:
            DataError: If the field is missing, no text, empty, or holds half of a character.
        """
        value = self._value(field)
        if not isinstance(value, str):
            raise self.error(field, f"must be text, got {_kind(value)}")
        if not value.strip():
            raise self.error(field, "is empty")
        return self._whole(field, value)

    def texts(self, field: str) -> tuple[str, ...]:
        """The field's list of at least two texts, each without surrounding whitespace.

        Raises:
            DataError: If the field is missing or anything else.
        """
        value = self._value(field)
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of texts, got {_kind(value)}")
        if len(value) < 2:
            raise self.error(field, f"must hold at least 2 texts, got {len(value)}")
        for position, item in enumerate(value):
            if not isinstance(item, str):
                raise self.error(field, f"must hold texts, item {position} is {_kind(item)}")
            if not item.strip():
                raise self.error(field, f"holds an empty text, item {position}")
        return tuple(self._whole(field, item) for item in value)

    def index(self, field: str, below: int) -> int:
        """The field's whole number, at least 0 and less than ``below``.

        Raises:
            DataError: If the field is missing, no whole number, or out of range.
        """
        value = self._value(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(field, f"must be a whole number, got {_kind(value)}")
        if not 0 <= value < below:
            raise self.error(field, f"must be 0 to {below - 1}, got {value}")
        return value

    def error(self, field: str, problem: str) -> DataError:
        """An error that names the row and the field, for the caller to raise."""
        return DataError(f"{self.source}: field {field!r} {problem}")

    def _whole(self, field: str, text: str) -> str:
        """Stripped, unless it has no UTF-8: JSON can escape one half of a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            problem = f"holds half of a character, {half!a} at {error.start + 1}: cut text?"
            raise self.error(field, f"{problem} Write it whole or take it out") from error
        return text.strip()

    def _value(self, field: str) -> object:
        if field not in self.fields:
            raise self.error(
                field, f"is missing; the row has: {', '.join(self.fields) or 'nothing'}"
            )
        return self.fields[field]


def read_rows(path: Path) -> list[Row]:
    """Reads a JSONL file: one JSON object per line, UTF-8; blank lines are passed over.

    Raises:
        MissingFileError: If there is no such file.
        DataError: If the file is empty, or a line is not UTF-8 or no JSON object.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; {_listing(path.parent)}")
    rows = []
    with path.open("rb") as lines:  # bytes, so that a wrong encoding can be traced to its row
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse(line, f"{path}:row {number}"))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def task_rows(folder: Path, split: Split) -> list[Row]:
    """Reads one split of a task from its folder: ``<folder>/<split>.jsonl``.

    Raises:
        DataError: If the folder or the file is missing (naming ``data.init_args.data_dir`` and
            what is there instead), or the file is malformed.
    """
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}; {_listing(folder.parent)}. "
            "Set data.init_args.data_dir to the folder that holds one folder per task"
        )
    return read_rows(folder / f"{split}.jsonl")


def _parse(line: bytes, source: str) -> Row:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (byte {error.start + 1} of the line)") from error
    try:
        fields = json.loads(text.rstrip())  # with its end the place could be on the next line
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source} is not JSON: {error.msg} at character {error.pos + 1}"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{source} must be a JSON object with named fields, got {_kind(fields)}")
    return Row(fields, source)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"neither does {folder} exist"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{folder} holds: {shown or 'nothing'}"
