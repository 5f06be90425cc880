"""What a study's runs found of the knowledge that was planted to be forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lwf_lightning.forgetting.planted import confidence_by_part
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
    """Records, those that lack the figures completed from their folders where these still lie."""
    return [
        record if "area" in record else record | found_figures(study, log_folder(study, record))
        for record in records
    ]


def log_folder(study: Study, record: Record) -> Path:
    """Folder of a run's scores and curves, also in a study that was moved since."""
    log = Path(record["log"])
    inner = log.relative_to(record["folder"])
    return study.folder / "runs" / str(record["run"]) / inner
