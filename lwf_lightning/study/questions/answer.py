"""The answer to a question: a table, a picture and numbers, in three files."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwf_lightning.files import whole_file
from lwf_lightning.study.perform import commit
from lwf_lightning.study.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
        title: The question.
        headings: Of the table.
        rows: Of the table, as text.
        note: What the columns mean: range, direction, unit.
        data: All numbers, as primitives.
        figure: The picture.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    data: dict[str, Any]
    figure: Figure

    def markdown(self) -> str:
        """Title, table and note."""
        return "\n".join(
            [f"# {self.title}", "", *markdown_table(self.headings, self.rows), "", self.note, ""]
        )

    def save(self, folder: Path, how: dict[str, Any]) -> None:
        """Writes ``answer.md``, ``answer.json`` and ``answer.png``, each whole or not at all.

        Args:
            folder: Where to.
            how: What made it, as primitives, for the JSON file.
        """
        packages = ("torch", "lightning", "transformers")
        versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
        record = {
            **how,
            "command": ["python", "-m", "lwf_lightning.study.questions", *sys.argv[1:]],
            "commit": commit(),
            "versions": versions,
            "answer": self.data,
        }
        with whole_file(folder / "answer.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        with whole_file(folder / "answer.md") as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")
        with whole_file(folder / "answer.png") as temporary:
            self.figure.savefig(temporary, dpi=110, format="png")
