"""What a method gains over all cells of a study together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Record
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.statistics import Gain, gain_over, t_interval
from lwf_lightning.study.summary import compared_figure, compared_runs

Pairs: TypeAlias = Mapping[tuple[str, str], tuple[float, float]]
"""Of one cell: a method's run and the baseline's with the same seed -> their figures."""


@dataclass(frozen=True)
class Pooled:
    """A method over all cells where it and the baseline have runs.

    Attributes:
        method: Key of the method, or of the study's ``best_of``.
        cells: How many cells; those whose runs, of a ``best_of`` of all its ways, are all the same
            count once.
        gain: Over all pairs of cell and seed; its ``seeds`` counts the pairs. As pairs of one cell
            share its data, its interval is of these cells, with other seeds.
        gain_of_cells: Mean of the cells' mean gains.
        low: Lower end of its 95 % interval with the cells as the sample (Student's t): what other
            cells may be like. NaN with one cell.
        high: Upper end.
        above: In how many pairs the method is better.
    """

    method: str
    cells: int
    gain: Gain
    gain_of_cells: float
    low: float
    high: float
    above: int


def pool(study: Study, records: Iterable[Record]) -> list[Pooled]:
    """A line per method and ``best_of``, without the baseline; none if the study has one cell.

    Args:
        study: The study.
        records: The records that it asks for.
    """
    if len(study.cells) < 2:
        return []
    sign = measure_of(study.figure).sign
    runs = compared_runs(study, records).values()
    methods = [key for key in (*study.methods, *study.best_of) if key != study.baseline]
    lines = []
    for key in methods:
        # Cells that share all their runs, as those of a method that does not forget, are one. Those
        # of a best_of are so only if all its ways are: what it picked may be shared by chance.
        different = {
            tuple(tuple(_pairs(study, own[way], own[study.baseline])) for way in ways): pairs
            for own in runs
            if (pairs := _pairs(study, own[key], own[study.baseline]))
            for ways in [study.best_of.get(key, [key])]
        }
        lines.append(_pooled(key, sign, different.values()))
    return [line for line in lines if line is not None]


def _pairs(study: Study, own: Iterable[Record], baseline: Iterable[Record]) -> Pairs:
    beside = {record["seed"]: record for record in baseline}
    return {
        (record["run"], other["run"]): (
            compared_figure(study, record),
            compared_figure(study, other),
        )
        for record in own
        if (other := beside.get(record["seed"])) is not None
    }


def _pooled(method: str, sign: int, cells: Iterable[Pairs]) -> Pooled | None:
    figures = [sign * np.array(list(pairs.values())) for pairs in cells]
    own, baseline = np.concatenate([np.empty((0, 2)), *figures]).T
    gain = gain_over(dict(enumerate(own)), dict(enumerate(baseline)))
    if gain is None:
        return None
    of_cells = np.array([np.mean(of_cell[:, 0] - of_cell[:, 1]) for of_cell in figures])
    low, high, _ = t_interval(of_cells)
    return Pooled(
        method=method,
        cells=len(figures),
        gain=replace(gain, mean=sign * gain.mean),
        gain_of_cells=float(of_cells.mean()),
        low=low,
        high=high,
        above=int(np.sum(own > baseline)),
    )
