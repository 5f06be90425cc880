"""A module whose configure_optimizers is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

Make = Callable[..., Any]


@pytest.fixture
def fit(
    make_module: Make, make_data: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Takes three steps with the optimizers that a function makes of the parameters."""

    def call(own: Callable[[list[Any]], Any], schedule: str) -> Any:
        module = make_module(schedule=schedule, unlearning_interval=1, without_scores="use_all")
        monkeypatch.setattr(
            module, "configure_optimizers", lambda: own(list(module.model.parameters()))
        )
        trainer = make_trainer(max_steps=3)
        trainer.fit(module, make_data())
        return trainer

    return call


def test_a_scheduler_may_be_left_out(fit: Make) -> None:
    trainer = fit(lambda parameters: SGD(parameters, lr=0.25), "never")
    assert trainer.global_step == 3
    assert trainer.callback_metrics["train/learning_rate"] == 0.25


def test_a_scheduler_is_stepped_with_each_learning_step(fit: Make) -> None:
    def own(parameters: list[Any]) -> Any:
        learning, unlearning = SGD(parameters, lr=0.25), SGD(parameters, lr=0.25)
        halved = StepLR(learning, 1, 0.5)
        return [learning, unlearning], [{"scheduler": halved, "interval": "step"}]

    trainer = fit(own, "periodic")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25 / 8


def one(parameters: list[Any]) -> Any:
    return SGD(parameters, lr=0.1)


def two(parameters: list[Any]) -> Any:
    return [one(parameters), one(parameters)]


def one_of_epochs(parameters: list[Any]) -> Any:
    optimizer = one(parameters)
    return [optimizer], [StepLR(optimizer, 1)]


@pytest.mark.parametrize(
    ("own", "schedule", "got"),
    [
        (one, "periodic", r"1 and \[\]"),
        (two, "never", r"2 and \[\]"),
        (one_of_epochs, "never", r"1 and \['epoch'\]"),
    ],
)
def test_what_the_steps_cannot_go_by_is_refused_before_anything_is_elicited(
    own: Any, schedule: str, got: str, fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lwf_lightning.datamodule.elicit", lambda *_, **__: pytest.fail("it has elicited")
    )
    with pytest.raises(ValueError, match=f"configure_optimizers must return .*got {got}"):
        fit(own, schedule)
