"""What a method gains over all cells of a study together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lwf_lightning.study.config import Study
from lwf_lightning.study.matrix import Record
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.statistics import Gain, stratified_interval, t_interval
from lwf_lightning.study.summary import compared_figure, compared_runs

Pairs: TypeAlias = Mapping[int, tuple[Record, Record]]
"""Of one cell: seed -> a method's run and the baseline's."""


@dataclass(frozen=True)
class Pooled:
    """A method over all cells where it and the baseline have runs.

    Cells that share runs, such as those of a baseline that does not forget, are one group: they
    rise and fall together. A seed counts in a group once all its cells have it.

    Attributes:
        method: Key of the method, or of the study's ``best_of``.
        cells: How many cells; those whose runs, of a ``best_of`` of all its ways, are all the same
            count once.
        groups: How many groups they are, each of one cell where none shares a run.
        gain: Mean of the groups' mean gains; its ``seeds`` counts the pairs of cell and seed. Its
            interval says what other seeds may give in these same cells: in each group the sample is
            what a seed gains on average over its cells, and how far apart groups lie does not
            count. NaN where a group has one seed.
        low: Lower end of the gain's 95 % interval with the groups as the sample (Student's t): what
            other cells may give. NaN with one group.
        high: Upper end.
        above: In how many pairs the method is better; one with a run that diverged does not count.
    """

    method: str
    cells: int
    groups: int
    gain: Gain
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
    runs = compared_runs(study, records).values()
    methods = [key for key in (*study.methods, *study.best_of) if key != study.baseline]
    lines = []
    for key in methods:
        # Cells that share all their runs, as those of a method that does not forget, are one. Those
        # of a best_of are so only if all its ways are: what it picked may be shared by chance.
        different = {
            tuple(_names(_pairs(own[way], own[study.baseline])) for way in ways): pairs
            for own in runs
            if (pairs := _pairs(own[key], own[study.baseline]))
            for ways in [study.best_of.get(key, [key])]
        }
        lines.append(_pooled(study, key, different.values()))
    return [line for line in lines if line is not None]


def _pairs(own: Iterable[Record], baseline: Iterable[Record]) -> Pairs:
    beside = {record["seed"]: record for record in baseline}
    return {
        record["seed"]: (record, other)
        for record in own
        if (other := beside.get(record["seed"])) is not None
    }


def _names(pairs: Pairs) -> frozenset[tuple[str, str]]:
    return frozenset((record["run"], other["run"]) for record, other in pairs.values())


def groups_that_share(cells: Sequence[Set[str]]) -> list[list[int]]:
    """Places of the cells, those together that share runs, be it through a third.

    Args:
        cells: The names of each cell's runs.
    """
    groups: list[tuple[Set[str], list[int]]] = []
    for place, runs in enumerate(cells):
        members = [place]
        apart = []
        for group in groups:
            if runs.isdisjoint(group[0]):
                apart.append(group)
            else:
                runs, members = runs | group[0], [*group[1], *members]
        groups = [*apart, (runs, members)]
    return [members for _, members in groups]


def _figures(study: Study, group: Sequence[Pairs]) -> np.ndarray:
    """Cells x seeds that all of them have x (method, baseline); higher is better."""
    seeds = sorted(set.intersection(*(set(pairs) for pairs in group)))
    figures = [[[compared_figure(study, r) for r in pairs[s]] for s in seeds] for pairs in group]
    return measure_of(study.figure).sign * np.array(figures)


def _pooled(study: Study, method: str, cells: Iterable[Pairs]) -> Pooled | None:
    cells = list(cells)
    names = [frozenset(run for pair in _names(pairs) for run in pair) for pairs in cells]
    groups = [[cells[place] for place in places] for places in groups_that_share(names)]
    figures = [f for group in groups if (f := _figures(study, group)).size]
    if not figures:
        return None
    gains = [f[..., 0] - f[..., 1] for f in figures]
    by_seed = [own.mean(axis=0) for own in gains]
    of_groups = np.array([own.mean() for own in by_seed])
    sign = measure_of(study.figure).sign
    seeds_low, seeds_high, p_value = stratified_interval(by_seed)
    low, high, _ = t_interval(of_groups)
    return Pooled(
        method=method,
        cells=sum(len(own) for own in gains),
        groups=len(gains),
        gain=Gain(
            seeds=sum(own.size for own in gains),
            mean=sign * float(np.mean([f[..., 0].mean() for f in figures])),
            gain=float(of_groups.mean()),
            low=seeds_low,
            high=seeds_high,
            p_value=p_value,
        ),
        low=low,
        high=high,
        above=sum(int(np.sum(own > 0)) for own in gains),
    )
