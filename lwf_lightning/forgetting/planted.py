"""How well confidence finds what was planted: texts that are known to be worth forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from lwf_lightning.files import json_lines


@dataclass(frozen=True)
class PartScores:
    """Which part of the planted knowledge each text is about, in order of its confidence.

    Attributes:
        parts: Part of each text, highest forgetting confidence first.
        selected: Whether each of them was selected.
        area: Area under the ROC curve of the part to be forgotten by confidence, 0 to 1; 0.5 is
            chance, NaN where all texts or none belong to it.
        precision: Share of the selected texts that belong to it, 0 to 1; NaN with none selected.
    """

    parts: list[str]
    selected: list[bool]
    area: float
    precision: float


def confidence_by_part(
    run_folder: Path, planted_rows: Path, *, field: str = "part", value: str = "outdated"
) -> PartScores:
    """Joins the scores of a run's last refresh with what is known of each prompt.

    Texts of prompts that the rows lack are left out, and so are rows without a prompt.

    Args:
        run_folder: Folder of a run that scored its self-knowledge.
        planted_rows: JSONL with ``prompt`` and the field.
        field: The field that tells parts apart.
        value: Its value in the rows that should be forgotten.
    """
    known = [row for row in json_lines(planted_rows) if "prompt" in row]
    part_of = {row["prompt"].strip(): row.get(field) for row in known}  # as tasks read them
    rows = [row for row in last_scores(run_folder) if row["prompt"].strip() in part_of]
    parts = [str(part_of[row["prompt"].strip()]) for row in rows]
    sought = torch.tensor([part == value for part in parts], dtype=torch.bool)
    selected = torch.tensor([bool(row["selected"]) for row in rows], dtype=torch.bool)
    # Ranks, since torchmetrics squashes what lies outside [0, 1] by a sigmoid that may saturate.
    _, places = np.unique([row["confidence"] for row in rows], return_inverse=True)
    ranks = torch.from_numpy(places) / len(rows)
    found = bool(sought.any()) and not bool(sought.all())
    return PartScores(
        parts=parts,
        selected=selected.tolist(),
        area=float(binary_auroc(ranks, sought.long())) if found else float("nan"),
        precision=float(sought[selected].double().mean()),
    )


def last_scores(run_folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's last refresh, as they were written; none if nothing was scored."""
    files = sorted((run_folder / "scores").glob("step-*.jsonl"))
    if not files:
        return []
    return json_lines(files[-1])
