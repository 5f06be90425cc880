"""Whole fits in bfloat16: they train, and what needs float32 keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Make = Callable[..., Any]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains_and_unlearns(
    precision: Any, make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    module = make_module()
    validated = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = make_trainer(precision=precision, callbacks=[make_callback()], **validated)
    trainer.fit(module, make_data())
    assert module.unlearning_steps == 2
    assert all(torch.isfinite(p).all() for p in module.model.parameters())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_rates_that_bf16_rounds_away_are_said(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    trainer = make_trainer(precision="bf16-true", max_steps=1, callbacks=[make_callback()])
    said = (
        "a step of learning_rate times unlearning_scale, 1e-06, moves [0-9.]+% of the weights only"
    )
    with (
        pytest.warns(UserWarning, match="a step of learning_rate, 1e-05, moves"),
        pytest.warns(UserWarning, match=said),
    ):
        trainer.fit(make_module(learning_rate=1e-5), make_data())


def test_under_autocast_every_step_sees_the_weights_of_the_step_before(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    # all steps of one training_step share an autocast context, which caches casts of the weights
    seen: list[float] = []
    module = make_module(schedule="ahead", ahead_steps=4, unlearning_scale=1.0)
    module._log_unlearning = lambda figures: seen.append(float(figures["unlearn/nll"]))
    data = make_data(forget_batch_size=100)  # each step unlearns the same texts
    callback = make_callback(probe_steps=8)
    trainer = make_trainer(precision="bf16-mixed", max_steps=1, callbacks=[callback])
    trainer.fit(module, data)
    assert len(set(seen)) == 4
    assert seen[-1] > seen[0]

    exact = make_callback(probe_steps=8)
    make_trainer(max_steps=1, callbacks=[exact]).fit(make_module(), make_data())
    anchor, expected = callback.load_tensors()[1], exact.load_tensors()[1]
    assert module.base_weights is not None
    for name, start in module.base_weights.items():
        moved, should = anchor[name] - start, expected[name] - start
        assert torch.nn.functional.cosine_similarity(moved.flatten(), should.flatten(), dim=0) > 0.9


def test_scores_are_float32_in_bf16(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    callback = make_callback()
    make_trainer(precision="bf16-true", callbacks=[callback]).fit(make_module(), make_data())
    assert callback.scores.alignment.dtype == torch.float32
    assert callback.scores.sensitivity.dtype == torch.float32
