"""All cells together, where cells share runs: against what is computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.matrix import Run, comparison_runs
from lwf_lightning.study.pooled import Pooled, pool
from lwf_lightning.study.tables import pooled_table

TASKS, FORGOTTEN, SEEDS = 4, 5, 3


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Each of four tasks is learned in five cells, and plain fine-tuning is one run for them."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"model": {"schedule": "ahead"}, "data": {}}))
    cells: dict[str, Any] = {
        f"{task}-{other}": {"data.learning_task": task, "data.forgetting_tasks": [other]}
        for task in "abcd"
        for other in "vwxyz"
    }
    methods = {
        "vanilla": Method({"model.schedule": "never"}, uses_forgetting=False),
        "lwf": Method(),
    }
    return Study("tasks", str(base), methods, cells, list(range(SEEDS)))


@pytest.fixture
def runs(study: Study) -> list[Run]:
    return comparison_runs(study, [])


def lwf_over(
    study: Study, runs: list[Run], plain: np.ndarray, lwf: np.ndarray, lacking: tuple[int, ...] = ()
) -> Pooled:
    """The summary of runs with these figures, by task, cell of it and seed; a-v may lack seeds."""
    records: list[dict[str, Any]] = []
    for run in runs:
        task, other = ("abcd".index(run.cells[0][0]), "vwxyz".index(run.cells[0][2]))
        shared = run.method == "vanilla"
        if not shared and (task, other) == (0, 0) and run.seed in lacking:
            continue
        figure = plain[task, run.seed] if shared else lwf[task, other, run.seed]
        records.append(
            {
                "run": run.identity, "stage": run.stage, "cells": list(run.cells),
                "method": run.method, "seed": run.seed, "setting": {}, "curves": {},
                "figures": {study.figure: float(figure)},
            }
        )  # fmt: skip
    (line,) = pool(study, records)
    return line


def drawn(source: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Figures of plain fine-tuning and LWF when neither is better."""
    shapes = ((TASKS, SEEDS), (TASKS, FORGOTTEN, SEEDS))
    plain, lwf = (0.5 + 0.02 * source.normal(size=shape) for shape in shapes)
    return plain, lwf


def t_interval_of(sample: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample)
    return sample.mean() - half, sample.mean() + half


@pytest.mark.parametrize("baseline", ["vanilla", "lwf"])
def test_cells_that_share_runs_are_one_observation(
    study: Study, runs: list[Run], baseline: str
) -> None:
    plain, lwf = drawn(np.random.default_rng(1))
    against = Study(**{**vars(study), "baseline": baseline})
    line = lwf_over(against, runs, plain, lwf)
    by_hand = lwf.mean(axis=1) - plain  # of a task and a seed, over the cells that share its run
    above = int(np.sum(lwf > plain[:, None]))
    if baseline == "lwf":
        by_hand, above = -by_hand, TASKS * FORGOTTEN * SEEDS - above
    assert (line.groups, line.gain.seeds) == (TASKS, TASKS * FORGOTTEN * SEEDS)
    assert line.cells == TASKS * FORGOTTEN
    table = pooled_table(against, [line])
    assert (table.headings[1], table.rows[0][1]) == ("cells in groups that share runs", "20 in 4")
    assert line.above == above
    assert line.gain.gain == pytest.approx(by_hand.mean())
    assert (line.low, line.high) == pytest.approx(t_interval_of(by_hand.mean(axis=1)))


def test_without_any_effect_one_interval_in_twenty_excludes_it(
    study: Study, runs: list[Run]
) -> None:
    source = np.random.default_rng(0)
    draws = 200
    missed = np.zeros(2)
    for _ in range(draws):
        line = lwf_over(study, runs, *drawn(source))
        ends = ((line.gain.low, line.gain.high), (line.low, line.high))
        missed += [not low <= 0 <= high for low, high in ends]
    assert (missed / draws <= 0.09).all()  # 0.05 and more than two standard errors


def test_a_seed_counts_once_all_cells_that_share_its_runs_have_it(
    study: Study, runs: list[Run]
) -> None:
    """Or what sets the cells apart would be taken for what sets the seeds apart."""
    plain, lwf = drawn(np.random.default_rng(2))
    lwf += np.arange(FORGOTTEN)[:, None]
    line = lwf_over(study, runs, plain, lwf, lacking=(2,))
    of_tasks = (lwf.mean(axis=1) - plain).mean(axis=1)
    of_tasks[0] = (lwf[0].mean(axis=0) - plain[0])[:2].mean()
    assert line.gain.seeds == TASKS * FORGOTTEN * SEEDS - FORGOTTEN
    assert line.gain.gain == pytest.approx(of_tasks.mean())
    assert (line.low, line.high) == pytest.approx(t_interval_of(of_tasks))
    without = lwf_over(study, runs, plain, lwf, lacking=(0, 1, 2))  # the cell has not begun
    assert (without.cells, without.groups) == (TASKS * FORGOTTEN - 1, TASKS)
    assert without.gain.seeds == (TASKS * FORGOTTEN - 1) * SEEDS
