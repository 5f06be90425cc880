"""Whether runs are validated after they have learned: tuning goes by the last validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from lwf_lightning.study.config import Study
from lwf_lightning.study.length import last_validation_of
from lwf_lightning.study.matrix import Record, Run
from lwf_lightning.study.overlay import looked_up


@dataclass(frozen=True)
class Validated:
    """A run, its learning steps, and how many it has taken when it validates last."""

    run: Run
    steps: int
    last: int


def by_configuration(runs: Iterable[Run]) -> Iterator[Validated]:
    """What configurations tell by themselves: intervals in steps, without a limit of epochs."""
    for run in runs:
        settings = {"check_val_every_n_epoch": 1, **(looked_up(run.config, "trainer") or {})}
        steps, interval = settings.get("max_steps"), settings.get("val_check_interval")
        in_steps = settings["check_val_every_n_epoch"] is None and _is_count(interval)
        if in_steps and _is_count(steps) and settings.get("max_epochs") in (None, -1):
            yield Validated(run, steps, last_validation_of(settings, 1, steps))


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def check_validations(found: Iterable[Validated]) -> list[str]:
    """Warnings of trials that learn on after their last validation, a line for those alike.

    Runs that are compared are judged by their test.

    Raises:
        ValueError: If a trial would learn, but not be validated after that; names it.
    """
    early: dict[tuple[int, int], list[Run]] = {}
    for one in found:
        if one.run.stage != "tuning":
            continue
        if one.steps and not one.last:
            raise ValueError(f"{one.run.identity}: {untrained(one.run, one.steps)}")
        if one.last < one.steps:
            early.setdefault((one.last, one.steps), []).append(one.run)
    return [
        f"Warning: {len(runs)} runs of {', '.join(dict.fromkeys(run.method for run in runs))} are "
        f"validated last at step {last} of {steps}, and judged by that: a "
        f"trainer.val_check_interval that {steps} is a multiple of validates at the end, too"
        for (last, steps), runs in early.items()
    ]


def untrained(run: Run, steps: int) -> str:
    """Why a run that learns is not judged by a validation before that, and the way out."""
    interval = looked_up(run.config, "trainer.val_check_interval")
    return (
        f"trainer.val_check_interval is {'1 epoch' if interval is None else interval}, but the run "
        f"ends at step {steps} (trainer.max_steps), so that it would be judged as it was before "
        f"training: take an interval that {steps} is a multiple of, or more steps"
    )


def told_of_untrained(study: Study, records: Iterable[Record]) -> list[str]:
    """A warning if recorded trials were validated before training alone; none otherwise."""
    figure = study.validation_figure
    curves = [record["curves"].get(figure) for record in records if record["stage"] == "tuning"]
    if not (count := sum(curve is not None and curve[0][-1] == 0 for curve in curves)):
        return []
    return [
        f"Warning: {count} trials of tuning were validated before training alone, so nothing is "
        "chosen by them: take a trainer.val_check_interval that trainer.max_steps reaches"
    ]
