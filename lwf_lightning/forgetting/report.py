"""Scored self-knowledge in a form that a person can read: JSONL and a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lwf_lightning.files import whole_file

if TYPE_CHECKING:
    from lwf_lightning.forgetting.confidence import ForgettingConfidence
    from lwf_lightning.forgetting.elicit import SelfText


def score_rows(
    texts: Sequence[SelfText], scores: ForgettingConfidence, forget_set: Iterable[int] | Tensor
) -> Iterator[dict[str, Any]]:
    """One row per text, highest confidence first.

    Each holds ``task``, ``row``, ``prompt``, ``answer``, ``alignment``, ``sensitivity``,
    ``confidence`` and ``selected``. ``row`` counts the task's prompts from 0: in its file, or among
    those that a limit has left.
    """
    selected = {int(index) for index in forget_set}
    confidence = scores.confidence.tolist()
    alignment, sensitivity = scores.alignment.tolist(), scores.sensitivity.tolist()
    for index in sorted(range(len(texts)), key=lambda i: -confidence[i]):
        yield {
            "task": texts[index].task,
            "row": texts[index].row,
            "prompt": texts[index].prompt,
            "answer": texts[index].answer,
            "alignment": alignment[index],
            "sensitivity": sensitivity[index],
            "confidence": confidence[index],
            "selected": index in selected,
        }


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line; the file is whole or not there at all."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def markdown_table(rows: Sequence[Mapping[str, Any]], ends: int = 10) -> str:
    """The ``ends`` first and last rows of :func:`score_rows` as a Markdown table."""
    shown = list(rows) if len(rows) <= 2 * ends else [*rows[:ends], None, *rows[-ends:]]
    lines = ["| confidence | selected | prompt | answer |", "|---:|:---:|---|---|"]
    for row in shown:
        if row is None:
            lines.append("| … | | | |")
            continue
        prompt, answer = (
            " ".join(row[key].split()).replace("|", "\\|") for key in ("prompt", "answer")
        )
        mark = "yes" if row["selected"] else ""
        lines.append(f"| {row['confidence']:.4g} | {mark} | {prompt} | {answer} |")
    return "\n".join(lines)
