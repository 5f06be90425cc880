"""The runs of a study: which there are, and what each one's configuration is."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, TypeAlias

from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.overlay import looked_up, overlaid

Stage: TypeAlias = Literal["tuning", "comparison"]
Record: TypeAlias = Mapping[str, Any]
"""One line of ``results.jsonl``."""


@dataclass(frozen=True)
class Run:
    """One fit of a study.

    Attributes:
        stage: Whether it chooses a setting or is compared.
        cells: The cells that it belongs to; several where it does not depend on what is forgotten.
        method: Key of the method.
        seed: Seed of the order of batches and of what the fit draws; a callback that has a seed of
            its own keeps it.
        setting: What tuning chose or tries, by path.
        config: The whole configuration of the fit.
    """

    stage: Stage
    cells: tuple[str, ...]
    method: str
    seed: int
    setting: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """Name of the run; the same configuration always has the same."""
        return f"{self.method}-{self.seed}-{digest_of(self.config)}"


def digest_of(value: Any) -> str:
    """Ten hexadecimal digits that equal values, such as configurations, share."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def settings_of(study: Study, method: str) -> list[dict[str, Any]]:
    """The settings that tuning tries for a method: the same for every cell.

    Drawn without repeats from the common space and the method's own, by the names of study and
    method; all of them where the space is no larger than the budget.
    """
    spec: Method = study.methods[method]
    space = {**study.common_space, **spec.space}
    if study.tuning is None or not space:
        return [{}]
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    if len(every) <= study.tuning.trials:
        return every
    return random.Random(f"{study.name}:{method}").sample(every, study.tuning.trials)


def tuning_in_words(study: Study) -> list[str]:
    """A line that says what settings were chosen by; none without tuning."""
    if study.tuning is None:
        return []
    most = max(len(settings_of(study, method)) for method in study.methods)
    seeds = ", ".join(map(str, study.tuning.seeds))
    return [
        f"Settings are chosen by {study.validation_figure} from up to {most} trials per method and "
        f"cell, with tuning seeds {seeds}."
    ]


def tuning_runs(study: Study) -> list[Run]:
    """The runs that choose each method's setting; none without tuning."""
    if study.tuning is None:
        return []
    return [
        run
        for method in study.methods
        for setting in settings_of(study, method)
        for seed in study.tuning.seeds
        for run in _runs(study, "tuning", method, seed, {cell: setting for cell in study.cells})
    ]


def comparison_runs(study: Study, records: Iterable[Record]) -> list[Run]:
    """The runs that are compared; of each method with tuning, once all its trials are recorded.

    Args:
        study: The study.
        records: What is recorded so far.
    """
    by_run = {record["run"]: record for record in records}
    chosen = _best_settings(study, by_run)
    return [
        run
        for seed in study.seeds  # first: stopped early, a study has as many of each method
        for method, settings in chosen.items()
        for run in _runs(
            study, "comparison", method, seed, {c: s for c, s in settings.items() if s is not None}
        )
    ]


def awaited_runs(study: Study, records: Iterable[Record]) -> int:
    """How many runs will be compared once tuning has chosen their settings; 0 when it has."""
    by_run = {record["run"]: record for record in records}
    return sum(
        1
        for method, settings in _best_settings(study, by_run).items()
        for seed in study.seeds
        for _ in _runs(
            study,
            "comparison",
            method,
            seed,
            {c: settings_of(study, method)[0] for c, s in settings.items() if s is None},
            among=study.cells,
        )
    )


def _best_settings(
    study: Study, by_run: Mapping[str, Record]
) -> dict[str, dict[str, dict[str, Any] | None]]:
    """Method -> cell -> :func:`best_setting`."""
    return {
        method: {cell: best_setting(study, method, cell, by_run) for cell in study.cells}
        for method in study.methods
    }


def runs_of(study: Study, by_run: Mapping[str, Record]) -> list[Run]:
    """The runs that the study has now: tuning first, then what its records allow."""
    return [*tuning_runs(study), *comparison_runs(study, by_run.values())]


def asked_for(study: Study, records: Iterable[Record]) -> list[dict[str, Any]]:
    """The records of the runs that the study has now, with their stage, cells and setting in it.

    What else is recorded, such as a setting that tuning no longer chooses or a seed that was
    dropped, is left out.
    """
    by_run = {record["run"]: record for record in records}
    return [
        {**record, "stage": run.stage, "cells": list(run.cells), "setting": dict(run.setting)}
        for run in runs_of(study, by_run)
        if (record := by_run.get(run.identity)) is not None
    ]


def best_setting(
    study: Study, method: str, cell: str, by_run: Mapping[str, Record]
) -> dict[str, Any] | None:
    """The setting with the best mean validation figure, of a loss the lowest; the first of equals.

    The figure is the last one that the trial's curve holds; NaN counts as the worst there is, and
    so does a trial that diverged.

    Returns:
        None as long as a trial has no record.

    Raises:
        ValueError: If a trial logged no such figure; names ``tuning.figure`` and the trial.
    """
    settings = settings_of(study, method)
    if study.tuning is None or len(settings) == 1:
        return settings[0]
    means = _validated(study, method, cell, by_run)
    return None if means is None else settings[max(range(len(settings)), key=means.__getitem__)]


def best_way(study: Study, name: str, cell: str, by_run: Mapping[str, Record]) -> str | None:
    """Of the methods of a ``best_of`` the one whose best setting validated best in a cell.

    Returns:
        The first of equals; None as long as a trial of one of them has no record.
    """
    best: dict[str, float] = {}
    for method in study.best_of[name]:
        means = _validated(study, method, cell, by_run)
        if means is None:
            return None
        best[method] = max(means)
    return max(best, key=best.__getitem__)


def _validated(
    study: Study, method: str, cell: str, by_run: Mapping[str, Record]
) -> list[float] | None:
    """The mean validation figure of each setting of a method with tuning, higher is better."""
    if (tuning := study.tuning) is None:
        return None
    means = []
    for setting in settings_of(study, method):
        found = [
            by_run.get(run.identity)
            for seed in tuning.seeds
            for run in _runs(study, "tuning", method, seed, {cell: setting}, among=study.cells)
        ]
        if any(record is None for record in found):
            return None
        means.append(fmean(validated(r, study.validation_figure) for r in found if r is not None))
    return means


def validated(trial: Record, figure: str) -> float:
    """What a trial is chosen by, higher is better: -inf if it diverged or the figure is NaN.

    Raises:
        ValueError: If it logged no such figure; names ``tuning.figure`` and the trial.
    """
    if "diverged" in trial:
        return -math.inf
    curves = trial["curves"]
    if figure not in curves:
        raise ValueError(
            f"tuning.figure: trial {trial['run']} has no {figure}, only {', '.join(curves)}"
        )
    value = measure_of(figure).sign * float(curves[figure][1][-1])
    return -math.inf if math.isnan(value) else value


def _runs(
    study: Study,
    stage: Stage,
    method: str,
    seed: int,
    settings: Mapping[str, Mapping[str, Any]],
    among: Iterable[str] | None = None,
) -> Iterator[Run]:
    """One run per cell, or one for all the cells whose configurations are the same."""
    cells_of: dict[str, list[str]] = {}
    runs: dict[str, Run] = {}
    for cell, setting in settings.items():
        config = run_config(study, method, cell, seed, setting, list(among or study.cells))
        run = Run(stage, (cell,), method, seed, setting, config)
        runs.setdefault(run.identity, run)
        cells_of.setdefault(run.identity, []).append(cell)
    for identity, run in runs.items():
        cells = tuple(cells_of[identity])
        yield Run(stage, cells, method, seed, run.setting, run.config)


def run_config(
    study: Study,
    method: str,
    cell: str,
    seed: int,
    setting: Mapping[str, Any],
    cells: Sequence[str],
) -> dict[str, Any]:
    """The whole configuration of a run; its folder is named by what runs it.

    Raises:
        ValueError: If a method that is said not to use forgetting does.
    """
    spec = study.methods[method]
    config = overlaid(study.base_config(), study.cells[cell])
    config = overlaid(config, spec.changes)
    if not spec.uses_forgetting:
        tasks = _forgetting_tasks_beside(study, cell, cells)
        config = overlaid(config, {"data.forgetting_tasks": tasks})
    config = overlaid(config, setting)
    if not spec.uses_forgetting:
        _check_that_nothing_is_forgotten(method, config)
    return overlaid(config, {"seed_everything": seed, "data.seed": seed, "model.seed": seed})


def _check_that_nothing_is_forgotten(method: str, config: Mapping[str, Any]) -> None:
    schedule = looked_up(config, "model.schedule") or "the default"
    regularizer = looked_up(config, "model.regularizer")
    if schedule != "never" or regularizer == "ewc":  # EWC's Fisher is that of the self-knowledge
        told = f"schedule is {schedule}" if schedule != "never" else f"regularizer is {regularizer}"
        raise ValueError(
            f"methods.{method}.uses_forgetting: false, but its model.{told}, so its runs depend on "
            "the forgetting tasks: leave uses_forgetting out, or change that"
        )


def _forgetting_tasks_beside(study: Study, cell: str, cells: Sequence[str]) -> list[str]:
    """All forgetting tasks of the cells with this cell's learning task: to be evaluated on."""
    configs = {name: overlaid(study.base_config(), study.cells[name]) for name in cells}
    learning = looked_up(configs[cell], "data.learning_task")
    return sorted(
        {
            task
            for config in configs.values()
            if looked_up(config, "data.learning_task") == learning
            for task in looked_up(config, "data.forgetting_tasks") or []
        }
    )
