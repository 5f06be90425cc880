"""What a study's runs found of the knowledge that was planted to be forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lwf_lightning.files import json_lines
from lwf_lightning.forgetting.planted import confidence_by_part, last_scores
from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Record


def found_figures(study: Study, log: Path) -> dict[str, float]:
    """``area`` and ``precision`` of a run's last refresh; none if it scored nothing planted."""
    if study.planted is None:
        return {}
    known = study.planted
    found = confidence_by_part(log, Path(known.rows), field=known.field, value=known.value)
    figures = {"area": found.area, "precision": found.precision}
    return {name: figure for name, figure in figures.items() if not math.isnan(figure)}


def with_found_figures(study: Study, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records with the figures of what the study seeks now.

    They are computed where a run's scores still lie; else those of the record are kept, unless it
    says that something else was sought.
    """
    return [_with_figures(study, record) for record in records]


def told_of_unknown(study: Study, records: Iterable[Record]) -> list[str]:
    """A warning if the rows hold none of the prompts that the runs scored; none otherwise.

    Args:
        study: The study.
        records: Its records, as :func:`with_found_figures` gives them.
    """
    records = list(records)
    if study.planted is None or any("area" in r or "precision" in r for r in records):
        return []
    known = {row.get("prompt", "").strip() for row in json_lines(Path(study.planted.rows))}
    scored = {row["prompt"].strip() for r in records for row in last_scores(log_folder(study, r))}
    if not scored or scored & known:
        return []
    return [
        f"Warning: planted.rows: {study.planted.rows} holds none of the {len(scored)} prompts that "
        "the runs scored, so nothing is said of what they found: name the file of their "
        "forgetting tasks' prompts"
    ]


def _with_figures(study: Study, record: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in record.items() if name not in ("area", "precision")}
    if study.planted is None:
        return others
    log = log_folder(study, record)
    if last_scores(log):
        return others | found_figures(study, log)
    sought = asdict(study.planted)
    return record if record.get("planted", sought) == sought else others


def log_folder(study: Study, record: Record) -> Path:
    """Folder of a run's scores and curves, also in a study that was moved since."""
    log = Path(record["log"])
    inner = log.relative_to(record["folder"])
    return study.folder / "runs" / str(record["run"]) / inner
