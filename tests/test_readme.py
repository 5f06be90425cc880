"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lwf_lightning.data.batch import batches_of
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.tasks import TaskFields

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shortened(example: str) -> str:
    """The same with few texts and steps."""
    for said, instead in (
        ("max_steps=60", "max_steps=2, limit_val_batches=1, limit_test_batches=1"),
        ("learning_rate=2.4e-3", "learning_rate=2.4e-3, unlearning_interval=1"),
        ("max_new_tokens=8", "max_new_tokens=8, forgetting_prompts=16"),
        ("[FisherCallback(", "[FisherCallback(probe_steps=2, fisher_texts=8, "),
    ):
        assert example.count(said) == 1
        example = example.replace(said, instead)
    return example


def test_the_python_examples_run(
    make_llama: Callable[..., Any],
    make_texts: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "model": make_llama(),
        "learning_batches": list(batches_of(make_texts(24, seed=1), 1, 0)),
        "forget_batches": list(batches_of(make_texts(8, seed=2), 1, 0)),
    }
    whole_example, callback_example, functions_example = blocks("python")
    fit: dict[str, Any] = {}
    exec(shortened(whole_example), fit)
    assert fit["trainer"].global_step == 2
    assert fit["module"].unlearning_steps > 0
    assert 0 <= fit["trainer"].callback_metrics["test/accuracy"] <= 1
    exec(callback_example, names)
    assert names["fisher"].refreshed_at == 16
    assert len(names["fisher"].forget_set) == 1
    assert names["trainer"].global_step == 24
    exec(functions_example, names)
    assert len(names["forget_set"]) == 2


def test_the_yaml_example_makes_tasks() -> None:
    (example,) = blocks("yaml")
    options = yaml.safe_load(example)["data"]["init_args"]
    options["custom_tasks"] = {
        name: TaskFields(**fields) for name, fields in options["custom_tasks"].items()
    }
    data = LWFDataModule(**options)
    assert not data.tasks["trivia"].has_answers
    assert data.tasks["support"].stop == ("\nCustomer:",)


def test_the_files_and_targets_it_names_exist() -> None:
    for path in re.findall(r"\]\((?!http)([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(configs/[\w.]+)`", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z0-9-]+)\b", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_defaults_of_its_table_are_those_of_the_code() -> None:
    import inspect

    from lwf_lightning import FisherCallback, LWFModule

    module = inspect.signature(LWFModule).parameters
    callback = inspect.signature(FisherCallback).parameters
    shown = {
        "`FisherCallback.anchor`, `probe_steps`": (
            f"`{callback['anchor'].default}`, {callback['probe_steps'].default}"
        ),
        "`FisherCallback.estimator`, `fisher_texts`": (
            f"`{callback['estimator'].default}`, {callback['fisher_texts'].default}"
        ),
        "`FisherCallback.forgetting_rate`": f"{callback['forgetting_rate'].default}",
        "`model.unlearning_interval`": (
            f"{module['unlearning_interval'].default}, `{module['schedule'].default}`, "
            f"{module['ahead_steps'].default}"
        ),
        "`model.objective`": (
            f"`{module['objective'].default}`, {module['unlearning_scale'].default}, "
            f"{module['unlearning_ceiling'].default:g} nats"
        ),
        "a pull to theta_base": f"`{module['regularizer'].default}`",
    }
    for argument, default in shown.items():
        (row,) = [line for line in README.splitlines() if f"| {argument}" in line]
        assert f"| {default}" in row, row
