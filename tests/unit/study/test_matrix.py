"""Which runs a study has, and what tuning chooses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lwf_lightning.study.config import Method, Study, Tuning
from lwf_lightning.study.matrix import (
    Run,
    awaited_runs,
    comparison_runs,
    settings_of,
    tuning_in_words,
    tuning_runs,
)
from lwf_lightning.study.overlay import looked_up, overlaid

BASE = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 60,
        "callbacks": [{"class_path": "lwf_lightning.FisherCallback", "init_args": {"seed": 0}}],
    },
    "model": {"class_path": "lwf_lightning.LWFModule", "init_args": {"learning_rate": 1.0}},
    "data": {
        "class_path": "lwf_lightning.LWFDataModule",
        "init_args": {"learning_task": "a", "forgetting_tasks": ["b"]},
    },
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return str(path)


def make(base: str, **options: Any) -> Study:
    defaults: dict[str, Any] = {
        "name": "small",
        "methods": {
            "vanilla": Method({"model.schedule": "never"}, uses_forgetting=False),
            "lwf": Method(),
        },
        "cells": {
            "a-b": {"data.forgetting_tasks": ["b"]},
            "a-c": {"data.forgetting_tasks": ["c"]},
            "d-b": {"data.learning_task": "d", "data.forgetting_tasks": ["b"]},
        },
        "seeds": [0, 1],
    }
    return Study(base=base, **(defaults | options))


def trial(run: Run, accuracy: float, **curves: list[float]) -> dict[str, Any]:
    """What tuning reads of a record."""
    values = {"val/accuracy": [0.0, accuracy]} | {f"val/{name}": v for name, v in curves.items()}
    return {
        "run": run.identity,
        "curves": {name: [list(range(len(own))), own] for name, own in values.items()},
    }


def test_a_path_leads_through_arguments_and_lists_of_classes() -> None:
    changed = overlaid(
        BASE,
        {
            "model.schedule": "never",
            "trainer.callbacks.FisherCallback.strategy": "lowest",
            "data.seed": 4,
        },
    )
    assert looked_up(changed, "model.schedule") == "never"
    assert looked_up(changed, "model.learning_rate") == 1.0
    callback = changed["trainer"]["callbacks"][0]
    assert callback["init_args"] == {"seed": 0, "strategy": "lowest"}
    assert looked_up(BASE, "trainer.callbacks.FisherCallback.strategy") is None
    assert "schedule" not in BASE["model"]["init_args"]  # the base is untouched


def test_a_class_is_added_to_a_list_or_takes_the_place_of_its_like() -> None:
    added = {"class_path": "lwf_lightning.callbacks.ValidateFirst"}
    changed = overlaid(BASE, {"trainer.callbacks": added})["trainer"]["callbacks"]
    assert changed == [*BASE["trainer"]["callbacks"], added]
    fisher = {"class_path": "lwf_lightning.FisherCallback", "init_args": {"seed": 1}}
    again = overlaid({"trainer": {"callbacks": changed}}, {"trainer.callbacks": fisher})
    assert again["trainer"]["callbacks"] == [fisher, added]
    assert overlaid(BASE, {"trainer.callbacks": [added]})["trainer"]["callbacks"] == [added]


def test_a_class_may_be_written_as_its_name_alone() -> None:
    plain = {"trainer": {"callbacks": ["a.Guard", "b.Other"]}}
    changed = overlaid(plain, {"trainer.callbacks.Guard.seed": 1})
    assert changed["trainer"]["callbacks"] == [
        {"class_path": "a.Guard", "init_args": {"seed": 1}},
        "b.Other",
    ]
    with pytest.raises(ValueError, match=r"holds no Fisher, only a\.Guard, b\.Other"):
        overlaid(plain, {"trainer.callbacks.Fisher.seed": 1})


def test_a_path_to_nowhere_names_itself() -> None:
    with pytest.raises(ValueError, match=r"trainer\.callbacks\.Guard\.x: the list holds no Guard"):
        overlaid(BASE, {"trainer.callbacks.Guard.x": 1})
    with pytest.raises(ValueError, match=r"trainer\.max_steps\.more: max_steps holds no"):
        overlaid(BASE, {"trainer.max_steps.more": 1})


def test_every_cell_method_and_seed_has_a_run_and_vanilla_is_shared(base: str) -> None:
    runs = comparison_runs(make(base), [])
    assert len({run.identity for run in runs}) == len(runs)
    vanilla = [run for run in runs if run.method == "vanilla"]
    assert sorted((run.cells, run.seed) for run in vanilla) == [
        (("a-b", "a-c"), 0),
        (("a-b", "a-c"), 1),
        (("d-b",), 0),
        (("d-b",), 1),
    ]
    both = next(run for run in vanilla if run.cells == ("a-b", "a-c"))
    assert looked_up(both.config, "data.forgetting_tasks") == ["b", "c"]
    assert len([run for run in runs if run.method == "lwf"]) == 6


def test_the_seed_reaches_every_part_of_a_run(base: str) -> None:
    run = next(run for run in comparison_runs(make(base), []) if run.seed == 1)
    for path in ("seed_everything", "data.seed", "model.seed"):
        assert looked_up(run.config, path) == 1


def test_every_method_gets_the_same_number_of_trials(base: str) -> None:
    study = make(
        base,
        common_space={"model.learning_rate": [float(n) for n in range(10)]},
        tuning=Tuning(trials=4, seeds=[7, 8]),
    )
    assert [len(settings_of(study, method)) for method in study.methods] == [4, 4]
    assert settings_of(study, "lwf") == settings_of(study, "lwf")
    drawn = settings_of(study, "lwf")
    assert len({tuple(setting.items()) for setting in drawn}) == 4
    assert comparison_runs(study, []) == []  # nothing is compared before its trials are done


def test_the_best_mean_validation_figure_is_chosen_for_each_cell(base: str) -> None:
    study = make(
        base, common_space={"model.learning_rate": [1.0, 2.0]}, tuning=Tuning(seeds=[7, 8])
    )
    trials = tuning_runs(study)
    best = {"a-b": 2.0, "a-c": 2.0, "d-b": 1.0}

    def validation(cells: tuple[str, ...], setting: Any, seed: int) -> float:
        hit = setting["model.learning_rate"] == best[cells[0]]
        return (0.9 if hit else 0.5) + (0.3 if seed == 7 and not hit else 0.0)

    records = [trial(run, validation(run.cells, run.setting, run.seed)) for run in trials]
    runs = comparison_runs(study, records)
    assert {c: run.setting["model.learning_rate"] for run in runs for c in run.cells} == best
    missing = [record for record in records if record["run"] != trials[0].identity]
    untuned = {run.method for run in comparison_runs(study, missing) if "a-b" in run.cells}
    assert untuned == {"lwf"}  # vanilla lacks a trial
    every = len(runs)
    assert [awaited_runs(study, known) for known in ([], missing, records)] == [
        every,  # as many as there are in the end, the shared ones counted once
        len(study.seeds),  # vanilla's in the one cell pair whose trials are incomplete
        0,
    ]


def test_tuning_chooses_by_the_figure_that_is_asked_for_now(base: str) -> None:
    tuning = Tuning(seeds=[7], figure="val/other")
    study = make(base, methods={"vanilla": Method(space={"model.lr": [1, 2]})}, tuning=tuning)
    records = [
        trial(run, run.setting["model.lr"], other=[0.0, -run.setting["model.lr"]])
        for run in tuning_runs(study)
    ]
    assert {run.setting["model.lr"] for run in comparison_runs(study, records)} == {1}
    other = make(base, methods=study.methods, tuning=Tuning(seeds=[7], figure="val/nothing"))
    with pytest.raises(ValueError, match=r"tuning\.figure: .*no val/nothing, only .*val/other"):
        comparison_runs(other, records)


def test_of_a_loss_the_lowest_is_chosen(base: str) -> None:
    methods = {"vanilla": Method(space={"model.lr": [1, 2, 3]})}
    study = make(base, methods=methods, tuning=Tuning(seeds=[7], figure="val/loss"))
    losses = {1: 0.5, 2: 0.3, 3: math.nan}
    records = [
        trial(run, 0.5, loss=[0.0, losses[run.setting["model.lr"]]]) for run in tuning_runs(study)
    ]
    assert {run.setting["model.lr"] for run in comparison_runs(study, records)} == {2}


def test_tuning_chooses_by_what_is_compared_unless_it_says_otherwise(base: str) -> None:
    methods = {"vanilla": Method(space={"model.lr": [1, 2]})}
    study = make(base, methods=methods, tuning=Tuning(seeds=[7]), figure="test/loss")
    rates = [run.setting["model.lr"] for run in tuning_runs(study)]
    records = [  # the first has the better accuracy, the second the lower loss
        trial(run, 1 / rate, loss=[9.0, 1 / rate])
        for run, rate in zip(tuning_runs(study), rates, strict=True)
    ]
    assert {run.setting["model.lr"] for run in comparison_runs(study, records)} == {2}
    assert make(base, tuning=Tuning()).validation_figure == "val/accuracy"
    assert tuning_in_words(study) == [
        "Settings are chosen by val/loss from up to 2 trials per method and cell, with tuning "
        "seeds 7."
    ]


@pytest.mark.parametrize("order", [[1, 2], [2, 1]])
def test_a_trial_that_diverged_is_not_chosen(base: str, order: list[int]) -> None:
    methods = {"vanilla": Method(space={"model.lr": order})}
    study = make(base, methods=methods, tuning=Tuning(seeds=[7, 8]))
    records = [
        trial(run, math.nan if run.setting["model.lr"] == 1 and run.seed == 7 else 0.1)
        for run in tuning_runs(study)
    ]
    assert {run.setting["model.lr"] for run in comparison_runs(study, records)} == {2}


def test_a_recorded_divergence_is_the_worst_and_keeps_no_method_waiting(base: str) -> None:
    methods = {"vanilla": Method(space={"model.lr": [1, 2]})}
    study = make(base, methods=methods, tuning=Tuning(seeds=[7]))
    records = [
        trial(run, 0.1)
        if run.setting["model.lr"] == 2
        else {"run": run.identity, "curves": {}, "diverged": "NaN"}
        for run in tuning_runs(study)
    ]
    assert {run.setting["model.lr"] for run in comparison_runs(study, records)} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "nothing"}, "baseline: 'nothing' is no key of methods: vanilla, lwf"),
        ({"ceiling": "twin"}, "ceiling: 'twin' is no key"),
        ({"figure": "accuracy"}, "figure: .* begins with test/, .* got 'accuracy'"),
        (
            {"tuning": Tuning(figure="test/accuracy")},
            r"tuning\.figure: .* begins with one of val/, .*, got 'test/accuracy'",
        ),
        ({"seeds": []}, "cells and seeds must not be empty"),
        ({"seeds": [1, 1]}, "seeds names one twice"),
        ({"tuning": Tuning(seeds=[1, 5])}, r"tuning\.seeds and seeds share \[1\]"),
        ({"tuning": Tuning(trials=0)}, "at least one trial"),
        ({"tuning": Tuning(seeds=[7, 7])}, r"tuning\.seeds names one twice: \[7, 7\]"),
        ({"common_space": {"a": [1]}}, "common_space: nothing is chosen from it without tuning"),
        ({"common_space": {"a": []}, "tuning": Tuning()}, "common_space: a has no value"),
        (
            {"methods": {"vanilla": Method(space={"a": [1, 2, 1]})}, "tuning": Tuning()},
            r"methods\.vanilla\.space: a names a value twice",
        ),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(
    base: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(base, **options)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, r"model\.schedule is the default"),
        ({"model.schedule": "ahead"}, r"model\.schedule is ahead"),
        ({"model.schedule": "never", "model.regularizer": "ewc"}, r"model\.regularizer is ewc"),
    ],
)
def test_a_method_that_forgets_is_not_shared(base: str, changes: dict[str, Any], told: str) -> None:
    methods = {"vanilla": Method(changes, uses_forgetting=False)}
    with pytest.raises(ValueError, match=rf"methods\.vanilla\.uses_forgetting: false, .*{told}"):
        comparison_runs(make(base, methods=methods), [])


def test_a_broken_base_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(ValueError, match=r"(?s)^base: .*broken\.yaml"):
        make(str(path)).base_config()


def test_a_missing_base_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base: .*none\.yaml does not exist"):
        make(str(tmp_path / "none.yaml")).base_config()


def test_a_base_that_logs_nothing_is_refused(base: str) -> None:
    Path(base).write_text(yaml.safe_dump(BASE | {"trainer": {"logger": False}}))
    with pytest.raises(ValueError, match=r"base: trainer\.logger is false in "):
        comparison_runs(make(base), [])


def test_a_folder_under_home_is_that_of_the_runs(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    study = make(base, output="~/studies")
    assert study.folder == tmp_path / "studies" / study.name
