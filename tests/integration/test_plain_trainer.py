"""An LWFModule under Lightning's own Trainer, where LWFTrainer would do more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lwf_lightning.callbacks import StepCheckpoint

Make = Callable[..., Any]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(**options: Any) -> L.Trainer:
        return L.Trainer(
            max_steps=1,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **options,
        )

    return make


def test_overfit_batches_is_refused(trainer: Make, make_module: Make, make_data: Make) -> None:
    message = r"trainer\.overfit_batches is of no use here: set data\.init_args\.learning_texts"
    with pytest.raises(ValueError, match=message):
        trainer(overfit_batches=1).fit(make_module(schedule="never"), make_data())


def test_a_validation_every_0_epochs_is_refused(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"trainer\.check_val_every_n_epoch must be at least 1"):
        make_trainer(check_val_every_n_epoch=0)


def test_a_step_checkpoint_that_nobody_calls_between_steps_is_warned_of(
    trainer: Make,
    make_trainer: Make,
    make_module: Make,
    make_data: Make,
    recwarn: pytest.WarningsRecorder,
) -> None:
    make_trainer(max_steps=1).fit(make_module(schedule="never"), make_data())
    assert not [w for w in recwarn if "StepCheckpoint will save" in str(w.message)]
    message = (
        r"StepCheckpoint will save at the end only, not every 3 steps: Trainer .*LWFTrainer, or "
        r"ModelCheckpoint\(every_n_train_steps=3\)"
    )
    with pytest.warns(UserWarning, match=message):
        trainer(callbacks=[StepCheckpoint(3)]).fit(make_module(schedule="never"), make_data())
