"""A fit that goes on from a checkpoint which an exception or a user saved within a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from peft import LoraConfig
from torch.utils.data import DataLoader

from lwf_lightning import LWFDataModule, LWFModule
from lwf_lightning.forgetting.weights import copy_weights

Make = Callable[..., Any]
SAVED_WITHIN = r": the run goes on, .*checkpoints/step-<n>\.ckpt of the run, goes on exactly"


class At:
    """Raises at one of the calls, as Ctrl-C would."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Interrupted(L.Callback):
    """Ends the process, as it were, within a step: in a hook of some part of it."""

    def __init__(self, place: str, call: int) -> None:
        self.place, self.at = place, At(call)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.place == "batch start":
            self.at()

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        # What is drawn here is not drawn again: dropout has to be that of the whole run.
        if self.place == pl_module.part.kind:
            self.at()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.place == "optimizer":
            trainer.optimizers[0].register_step_post_hook(self.at)


@pytest.fixture
def fit(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, tmp_path: Path
) -> Make:
    """Runs a fit with dropout; gives its module, its trainer and the file saved on an exception."""

    def run(
        ckpt_path: Path | None = None, *more: L.Callback, **model: Any
    ) -> tuple[LWFModule, L.Trainer, Path]:
        torch.manual_seed(1)
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.4)
        module = make_module(lora=lora, **model)
        saver = OnExceptionCheckpoint(tmp_path / "kept")
        trainer = make_trainer(max_steps=8, callbacks=[make_callback(), saver, *more])
        with suppress(SystemExit):  # Lightning's answer to Ctrl-C
            trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        return module, trainer, tmp_path / "kept" / "on_exception.ckpt"

    return run


@pytest.mark.parametrize(
    ("place", "call", "model"),
    [
        ("batch start", 1, {}),
        ("batch start", 4, {}),  # unlearning is due, and not done
        ("learning", 4, {}),  # and done
        ("learning", 7, {}),  # the first of an epoch
        ("unlearning", 1, {}),
        ("unlearning", 3, {"schedule": "ahead", "ahead_steps": 5}),
        ("unlearning", 4, {"schedule": "front_loaded", "ahead_steps": 3}),
        ("learning", 1, {"schedule": "ahead", "ahead_steps": 2}),
    ],
)
def test_a_run_goes_on_exactly_where_its_step_had_left_the_weights_alone(
    place: str, call: int, model: dict[str, Any], fit: Make, recwarn: pytest.WarningsRecorder
) -> None:
    whole, *_ = fit(**model)
    _, trainer, file = fit(None, Interrupted(place, call), **model)
    assert trainer.global_step < 8
    module, trainer, _ = fit(file, **model)
    assert trainer.global_step == 8
    assert module.unlearning_steps == whole.unlearning_steps
    torch.testing.assert_close(
        copy_weights(module.model), copy_weights(whole.model), rtol=0, atol=0
    )
    assert not [w for w in recwarn if "within a step" in str(w.message)]


class Saving(L.Callback):
    """Saves within a step of a run that goes on."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4 and not self.file.exists():
            trainer.save_checkpoint(self.file)


def test_a_run_does_not_notice_that_it_is_saved_within_a_step(fit: Make, tmp_path: Path) -> None:
    module, *_ = fit(None, Saving(tmp_path / "four.ckpt"))
    for other, *_ in (fit(), fit(tmp_path / "four.ckpt")):
        torch.testing.assert_close(
            copy_weights(other.model), copy_weights(module.model), rtol=0, atol=0
        )


def test_a_run_that_cannot_go_on_exactly_says_so_and_what_does(fit: Make) -> None:
    _, _, file = fit(None, Interrupted("optimizer", 3))
    with pytest.warns(UserWarning, match=f"while the weights took their learning.*{SAVED_WITHIN}"):
        fit(file)


def test_with_a_loader_of_ones_own_the_batch_of_the_step_is_lost(
    fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = LWFDataModule.train_dataloader

    def own(self: LWFDataModule) -> Any:
        return DataLoader(self.learning_encoded, 4, collate_fn=ours(self).collate_fn)

    monkeypatch.setattr(LWFDataModule, "train_dataloader", own)
    _, _, file = fit(None, Interrupted("batch start", 3))
    with pytest.warns(UserWarning, match=f"after its batch was drawn.*{SAVED_WITHIN}"):
        fit(file)
