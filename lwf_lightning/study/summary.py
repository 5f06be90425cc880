"""The records of a study as the numbers that tables and figures show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Record, best_way
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.statistics import Gain, adjusted_p_values, gain_over


@dataclass(frozen=True)
class Line:
    """A method in a cell, or the best of several.

    Attributes:
        cell: The cell.
        method: Key of the method, or of the study's ``best_of``.
        way: Of a ``best_of``, the method that validation picked; its runs are the line's.
        gain: Its figure, and its gain over the baseline: of a loss, how far it is below it. With a
            run of either that diverged the gain is NaN: those that are left would flatter one.
        diverged: How many of the seeds that are compared diverged; the mean leaves them out.
        adjusted_p_value: The paired test's, adjusted for all comparisons of the study, each counted
            once in however many cells its runs are. NaN for the ceiling: it is no method to choose,
            and its gain would lower the others' values.
        forgetting: Forgetting task -> its mean accuracy before training (NaN without a validation
            then) and after, on prompts of the validation split, which are not among those elicited.
        seen: The same on the very prompts that were elicited, where ``data.evaluate_seen`` is set.
        found: ``area`` and ``precision`` where knowledge was planted and scored, mean over
            seeds.
        seconds: Median time of a run, as a multiple of the baseline's; runs that were interrupted
            and resumed count in neither, and NaN means that one of the two has no others.
        memory: Median peak memory of a run, in the same way.
        setting: What tuning chose.
    """

    cell: str
    method: str
    way: str | None
    gain: Gain
    diverged: int
    adjusted_p_value: float
    forgetting: Mapping[str, tuple[float, float]]
    seen: Mapping[str, tuple[float, float]]
    found: Mapping[str, float]
    seconds: float
    memory: float
    setting: Mapping[str, Any]


def summarize(study: Study, records: Iterable[Record]) -> list[Line]:
    """One line per cell and method that has runs, then per ``best_of``, in the study's order.

    Raises:
        ValueError: If a run has no such figure; names ``figure`` and those that there are.
    """
    sign = measure_of(study.figure).sign
    found: list[tuple[str, str, Gain, list[Record], list[Record]]] = []
    for cell, runs in compared_runs(study, records).items():
        figures = {
            m: {r["seed"]: sign * compared_figure(study, r) for r in own} for m, own in runs.items()
        }
        ceiling = figures[study.ceiling] if study.ceiling else None
        for method in runs:
            gain = gain_over(figures[method], figures[study.baseline], ceiling)
            if gain is not None:
                gain = replace(gain, mean=sign * gain.mean)
                both = _beside(runs[method], runs[study.baseline])
                if len(left := _ended(both)) < len(both):
                    known = [compared_figure(study, record) for record in left]
                    gain = replace(gain, mean=fmean(known) if known else math.nan)
                found.append((cell, method, gain, runs[method], runs[study.baseline]))
    tested = {
        _names(own, baseline): gain.p_value
        for _, method, gain, own, baseline in found
        if method not in (study.baseline, study.ceiling)
    }
    adjusted = dict(zip(tested, adjusted_p_values(list(tested.values())), strict=True))
    return [
        Line(
            cell=cell,
            method=method,
            way=own[0]["method"] if method in study.best_of else None,
            gain=gain,
            diverged=sum("diverged" in record for record in _beside(own, baseline)),
            adjusted_p_value=adjusted.get(_names(own, baseline), math.nan),
            forgetting=_first_and_last(_ended(own), "forget/accuracy_"),
            seen=_first_and_last(_ended(own), "forget/seen_accuracy_"),
            found=_found(_ended(own)),
            seconds=_multiple("seconds", _ended(own), _ended(baseline)),
            memory=_multiple("peak_memory", _ended(own), _ended(baseline)),
            setting=own[0]["setting"],
        )
        for cell, method, gain, own, baseline in found
    ]


def _ended(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "diverged" not in record]


def _beside(own: Sequence[Record], baseline: Sequence[Record]) -> list[Record]:
    """Those whose seed the baseline has, too: what is compared."""
    seeds = {record["seed"] for record in baseline}
    return [record for record in own if record["seed"] in seeds]


def _names(*compared: Sequence[Record]) -> tuple[frozenset[str], ...]:
    """The runs of a comparison, which are the same in all cells that share them."""
    return tuple(frozenset(record["run"] for record in records) for records in compared)


def compared_runs(study: Study, records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    """Cell -> method or ``best_of`` -> its compared runs; of a ``best_of`` those of one method."""
    by_run = {record["run"]: record for record in records}
    compared = [record for record in by_run.values() if record["stage"] == "comparison"]
    runs: dict[str, dict[str, list[Record]]] = {}
    for cell in study.cells:
        own = [record for record in compared if cell in record["cells"]]
        of_cell = {m: [r for r in own if r["method"] == m] for m in study.methods}
        ways = {name: best_way(study, name, cell, by_run) for name in study.best_of}
        of_best = {name: of_cell[way] if way else [] for name, way in ways.items()}
        runs[cell] = {**of_cell, **of_best}
    return runs


def compared_figure(study: Study, record: Record) -> float:
    """The compared figure of a run; NaN if it diverged.

    Raises:
        ValueError: If it has none; names ``figure`` and those that there are.
    """
    if "diverged" in record:
        return math.nan
    figures = record["figures"]
    if study.figure not in figures:
        raise ValueError(
            f"figure: {record['run']} has no {study.figure}, only {', '.join(figures)}"
        )
    return float(figures[study.figure])


def _first_and_last(records: Sequence[Record], prefix: str) -> dict[str, tuple[float, float]]:
    names = {n for r in records for n in r["curves"] if n.startswith(prefix)}
    curves = {n: [r["curves"][n] for r in records if n in r["curves"]] for n in sorted(names)}
    return {
        name.removeprefix(prefix): (
            fmean(values[0] if steps[0] == 0 else math.nan for steps, values in own),
            fmean(values[-1] for _, values in own),
        )
        for name, own in curves.items()
    }


def _found(records: Sequence[Record]) -> dict[str, float]:
    return {
        name: fmean(known)
        for name in ("area", "precision")
        if (known := [r[name] for r in records if name in r])
    }


def _multiple(name: str, own: Sequence[Record], baseline: Sequence[Record]) -> float:
    # A resumed run knows of its last process alone; records from before say nothing of it.
    known = [[r[name] for r in records if not r.get("resumed")] for records in (own, baseline)]
    return float(median(known[0]) / median(known[1])) if all(known) else math.nan
