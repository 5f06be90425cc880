"""What a study lacks: the runs that have no record yet, and what waits for them."""

from __future__ import annotations

from collections.abc import Iterable

from lwf_lightning.named import first_of
from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Record, Run, runs_of
from lwf_lightning.study.results import read_records
from lwf_lightning.study.workers import results_file


def missing_runs(study: Study) -> list[Run]:
    """The runs without a record that can be performed now: tuning first, then what it allows."""
    return _missing(study, read_records(results_file(study)))


def _missing(study: Study, records: Iterable[Record]) -> list[Run]:
    by_run = {record["run"]: record for record in records}
    unique = {run.identity: run for run in runs_of(study, by_run) if run.identity not in by_run}
    return list(unique.values())


def what_diverged(records: Iterable[Record]) -> list[str]:
    """A line per method with compared runs that diverged, with the way out; names the first."""
    names: dict[str, list[str]] = {}
    for record in records:
        if record["stage"] == "comparison" and "diverged" in record:
            names.setdefault(record["method"], []).append(record["run"])
    return [
        f"{method}: {len(own)} of its compared runs diverged ({first_of(own)}), and "
        "comparisons with them show no gain and no p: lower its model.learning_rate or "
        "model.unlearning_scale, or raise model.max_skipped_steps, in changes or space"
        for method, own in names.items()
    ]


def what_is_missing(study: Study, records: Iterable[Record]) -> list[str]:
    """A line per method whose tuning or comparison lacks runs; names the first of them."""
    names: dict[tuple[str, str], list[str]] = {}
    for run in _missing(study, records):
        names.setdefault((run.method, run.stage), []).append(run.identity)
    words = {
        "tuning": "{}: its tuning lacks {} of the runs that it chooses by: {}",
        "comparison": "{}: the comparison lacks {}: {}",
    }
    lines = []
    for (method, stage), own in names.items():
        lines.append(words[stage].format(method, len(own), first_of(own)))
    return lines
