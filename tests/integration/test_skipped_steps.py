"""Steps whose loss or gradient is not finite: skipped, counted, and too many of them an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lwf_lightning.errors import NonFiniteLossError

Make = Callable[..., Any]


class Poison(L.Callback):
    """Makes the gradient of some steps NaN."""

    def __init__(self, batches: set[int]) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.hook = None
        if index in self.batches:
            parameter = next(pl_module.model.parameters())
            self.hook = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_module: Make, make_data: Make, make_trainer: Make, make_recorder: Make
) -> None:
    module, recorder = make_module(schedule="never"), make_recorder()
    trainer = make_trainer(max_steps=4, callbacks=[Poison({1, 2}), recorder])
    trainer.fit(module, make_data())
    assert module.skipped_steps == 2
    assert trainer.global_step == 4
    assert recorder.global_steps == [1, 1, 1, 2, 3, 4]
    torch.testing.assert_close(recorder.weights[0], recorder.weights[2], rtol=0, atol=0)
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unlearning_loss_that_is_not_finite_is_skipped_and_counted(
    value: float,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    make_recorder: Make,
) -> None:
    module, plain = make_module(schedule="ahead", ahead_steps=3), make_recorder()
    module.objective = lambda tokens, reference: tokens.per_text(tokens.token_losses() * value)
    module.objective.ascends, module.objective.needs_reference = True, False
    recorder = make_recorder()
    make_trainer(callbacks=[make_callback(), recorder]).fit(module, make_data())
    assert module.skipped_steps == 3
    make_trainer(callbacks=[plain]).fit(make_module(schedule="never"), make_data())
    torch.testing.assert_close(recorder.weights, plain.weights, rtol=0, atol=0)


def test_too_many_skipped_steps_stop_the_run_and_leave_its_checkpoint(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    module = make_module(schedule="never", max_skipped_steps=1)
    trainer = make_trainer(callbacks=[Poison({2, 3}), saver])
    message = r"2 steps had a NaN or infinite loss or grad.*--ckpt_path <file>"
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.fit(module, make_data())
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) == 2
    resumed = make_trainer(max_steps=3)
    resumed.fit(make_module(schedule="never"), make_data(), ckpt_path=str(kept[-1]))
    assert resumed.global_step == 3
