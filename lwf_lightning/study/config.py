"""What a study compares: cells x methods x seeds, each run an ordinary fit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from lwf_lightning.files import json_lines

Value: TypeAlias = str | bool | int | float | list | dict | None  # type: ignore[type-arg]
"""A value of a configuration as its file has it. Of ``Any`` the parser would read a string once
more: the estimator 'true' would become a bool."""

VALIDATED = ("val/", "forget/accuracy", "forget/seen_accuracy")
"""How the names of figures begin that a fit's validation measures."""

_NAMED = 20
"""Values that a message names."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        changes: What it changes in the base configuration, by the paths of
            :func:`~lwf_lightning.study.overlay.overlaid`.
        space: What tuning may choose for it, beside the study's common space: path -> values.
        uses_forgetting: Whether its runs depend on the forgetting tasks. One that does not, such
            as plain fine-tuning, is run once for all cells that share a learning task.
        label: Its name in tables and figures; by default its key.
    """

    changes: dict[str, Value] = field(default_factory=dict)
    space: dict[str, list[Value]] = field(default_factory=dict)
    uses_forgetting: bool = True
    label: str | None = None


@dataclass(frozen=True)
class Tuning:
    """The same budget for every method, on the validation split alone.

    Attributes:
        trials: Settings tried per method; drawn without repeats from its space.
        seeds: Seeds of each trial; none of them is a seed of the study itself.
        figure: The figure to choose by, averaged over the seeds: that of a run's last validation.
            The highest is the best, of a loss the lowest. By default the study's own figure, on
            the validation split.
    """

    trials: int = 8
    seeds: list[int] = field(default_factory=lambda: [1000, 1001])
    figure: str | None = None


@dataclass(frozen=True)
class Planted:
    """Knowledge of which it is known that it should be forgotten: confidence is judged by it.

    Attributes:
        rows: JSONL file with the prompts of the forgetting tasks, each with the field.
        field: The field that tells parts apart.
        value: Its value in the rows that should be forgotten.
    """

    rows: str
    field: str = "part"
    value: str = "outdated"


@dataclass(frozen=True)
class Study:
    """A comparison of methods.

    Attributes:
        name: Name of the study.
        base: Configuration file of an ordinary fit; every run starts from it.
        methods: The methods by key.
        cells: Pairs of learning task and forgetting tasks: name -> changes to the base.
        seeds: Seeds of the runs that are compared.
        baseline: Method that gains are measured against, or a key of ``best_of``.
        ceiling: Method that could not be held back, such as a clean twin; None if there is none.
        common_space: What tuning may choose for every method: path -> values.
        tuning: None takes every method as it is written.
        best_of: Ways to do one thing -> the methods that are these ways: a line of its own, which
            has in each cell the runs of the way whose tuning validated best.
        figure: The figure that is compared, measured on the test split; of a loss less is better.
        map: What varies between cells, as an axis says it -> cell -> its value: the panels of one
            figure of gains. None are needed, and cells may stand in several.
        planted: What is known of the forgetting prompts; None if nothing is.
        output: Folder of runs, results and report.
    """

    name: str
    base: str
    methods: dict[str, Method]
    cells: dict[str, dict[str, Value]]
    seeds: list[int]
    baseline: str = "vanilla"
    ceiling: str | None = None
    common_space: dict[str, list[Value]] = field(default_factory=dict)
    tuning: Tuning | None = None
    best_of: dict[str, list[str]] = field(default_factory=dict)
    figure: str = "test/accuracy"
    map: dict[str, dict[str, float]] = field(default_factory=dict)
    planted: Planted | None = None
    output: str = "runs/studies"

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is run.

        Raises:
            ValueError: If a named method or file is missing, there is nothing to compare or to
                choose from, names are no file's or stand twice, or seeds of tuning and comparison
                overlap.
        """
        for name, ways in self.best_of.items():
            self._check_ways(name, ways)
        if self.baseline not in {*self.methods, *self.best_of}:
            _raise_unknown("baseline", self.baseline, [*self.methods, *self.best_of])
        if self.ceiling is not None and self.ceiling not in self.methods:
            _raise_unknown("ceiling", self.ceiling, self.methods)
        self._check_names()
        self._check_figures()
        for factor, places in self.map.items():
            _check_places(factor, places, self.cells)
        if self.planted is not None:
            _check_planted(self.planted)
        if not self.cells or not self.seeds:
            raise ValueError("cells and seeds must not be empty: there would be nothing to run")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds names one twice: {self.seeds}")
        _check_values("common_space", self.common_space, self.tuning)
        for name, method in self.methods.items():
            _check_values(f"methods.{name}.space", method.space, self.tuning)
        if self.tuning is not None:
            if len(set(self.tuning.seeds)) < len(self.tuning.seeds):
                raise ValueError(f"tuning.seeds names one twice: {self.tuning.seeds}")
            if self.tuning.trials < 1 or not self.tuning.seeds:
                raise ValueError("tuning needs at least one trial and one seed")
            if shared := set(self.tuning.seeds) & set(self.seeds):
                raise ValueError(
                    f"tuning.seeds and seeds share {sorted(shared)}: a method would be chosen "
                    "on the runs it is judged by"
                )

    @property
    def folder(self) -> Path:
        """Folder of this study."""
        return Path(self.output).expanduser() / self.name

    def base_config(self) -> dict[str, Any]:
        """Reads the base configuration.

        Raises:
            ValueError: If the file is missing, no YAML, holds no named values, or logs nothing.
        """
        path = Path(self.base)
        if not path.is_file():
            raise ValueError(f"base: {path} does not exist")
        try:
            config = _read(path, path.stat().st_mtime_ns)
        except yaml.YAMLError as error:
            told = str(error).replace('"<unicode string>"', str(path))
            raise ValueError(f"base: {told}") from error
        if not isinstance(config, dict):
            raise ValueError(f"base: {path} holds no configuration")
        if (config.get("trainer") or {}).get("logger") is False:
            raise ValueError(
                f"base: trainer.logger is false in {path}, but a study reads what its runs log: "
                "leave it out"
            )
        return copy.deepcopy(config)

    @property
    def validation_figure(self) -> str:
        """What tuning chooses by; unless it says so, what is compared, on the validation split."""
        given = self.tuning.figure if self.tuning else None
        return given or f"val/{self.figure.split('/', 1)[-1]}"

    def label(self, method: str) -> str:
        """The name of a method in tables and figures."""
        spec = self.methods.get(method)
        label = (spec.label if spec else None) or method
        return " ".join(label.split())  # a table has it in one line

    def _check_names(self) -> None:
        for role, names in (("cells", self.cells), ("methods", self.methods)):
            for name in names:
                if "/" in name or "\\" in name:
                    raise ValueError(f"{role}: {name!r} holds a slash, and files are named by it")
        labels = [self.label(name) for name in (*self.methods, *self.best_of)]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"methods: two are called {label!r} in tables and figures: give one of them "
                    "another label, or another name in best_of"
                )

    def _check_figures(self) -> None:
        if not self.figure.startswith("test/"):
            raise ValueError(
                f"figure: what is compared is measured on the test split and begins with test/, as "
                f"test/accuracy, got {self.figure!r}"
            )
        if not self.validation_figure.startswith(VALIDATED):
            raise ValueError(
                "tuning.figure: what is chosen by is measured in validation and begins with one of "
                f"{', '.join(VALIDATED)}, got {self.validation_figure!r}"
            )

    def _check_ways(self, name: str, ways: Sequence[str]) -> None:
        role = f"best_of.{name}"
        if name in self.methods:
            raise ValueError(f"{role}: a method has this name already")
        if self.ceiling in ways:
            raise ValueError(f"{role}: {self.ceiling} is the ceiling, which nobody could choose")
        if self.tuning is None:
            raise ValueError(
                f"{role}: nothing is chosen without tuning: give the study one, as "
                "tuning: {trials: 8}"
            )
        if len(set(ways)) < max(2, len(ways)):
            raise ValueError(f"{role}: needs at least two methods, each once, got {ways}")
        for way in ways:
            if way not in self.methods:
                _raise_unknown(role, way, self.methods)


def _raise_unknown(role: str, key: str, known: Iterable[str]) -> NoReturn:
    raise ValueError(f"{role}: {key!r} is no key of methods: {', '.join(known)}")


def _check_values(name: str, space: Mapping[str, Sequence[Any]], tuning: Tuning | None) -> None:
    if space and tuning is None:
        raise ValueError(
            f"{name}: nothing is chosen from it without tuning: give the study one, as "
            "tuning: {trials: 8}"
        )
    for path, values in space.items():
        if not values:
            raise ValueError(f"{name}: {path} has no value to choose")
        if len(set(map(repr, values))) < len(values):
            raise ValueError(f"{name}: {path} names a value twice: {values}")


def _check_planted(planted: Planted) -> None:
    path = Path(planted.rows)
    if not path.is_file():
        raise ValueError(f"planted.rows: {path} does not exist")
    try:
        rows = json_lines(path)
    except ValueError as error:
        raise ValueError(f"planted.rows: {path} is no JSONL: {error}") from error
    for field_name, key in (("rows", "prompt"), ("field", planted.field)):
        if not any(key in row for row in rows):
            known = ", ".join({name: None for row in rows for name in row}) or "nothing"
            raise ValueError(f"planted.{field_name}: no row of {path} has {key!r}, only {known}")
    values = sorted({str(row[planted.field]) for row in rows if planted.field in row})
    if planted.value not in values:
        told = ", ".join(values[:_NAMED]) + (", ..." if len(values) > _NAMED else "")
        raise ValueError(
            f"planted.value: no row of {path} holds {planted.value!r} as {planted.field}, only "
            f"{told}"
        )


def _check_places(factor: str, places: Mapping[str, float], cells: Mapping[str, Any]) -> None:
    if unknown := places.keys() - cells.keys():
        raise ValueError(
            f"map: {factor}: {sorted(unknown)[0]!r} is no key of cells: {', '.join(cells)}"
        )
    if len(set(places.values())) < len(places):
        raise ValueError(f"map: {factor}: two cells have the same value")


@lru_cache(maxsize=4)
def _read(path: Path, changed_at: int) -> Any:
    """A YAML file, read anew when it has changed: a large matrix asks for it thousands of times."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
