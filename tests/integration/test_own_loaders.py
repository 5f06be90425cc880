"""Loaders of one's own beside an LWFModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lwf_lightning import LWFModule
from lwf_lightning.data.batch import batches_of

Make = Callable[..., Any]


@pytest.fixture
def loader(make_texts: Make) -> Any:
    return DataLoader(list(batches_of(make_texts(8), 4, 0)), batch_size=None)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_batches_that_are_none_of_the_datamodules_are_refused_by_name(
    stage: str, make_module: Make, make_trainer: Make, loader: Any
) -> None:
    trainer = make_trainer(limit_val_batches=1, max_steps=1, val_check_interval=1)
    loaders = [loader, loader] if stage == "fit" else [loader]
    with pytest.raises(TypeError, match=r"expects an EvalBatch of LWFDataModule, got dict: give"):
        getattr(trainer, stage)(make_module(schedule="never"), *loaders)


def test_the_loaders_of_a_datamodule_without_it_are_refused(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    module, data = make_module(schedule="never"), make_data()
    data.tokenizer = module.tokenizer
    data.setup("fit")
    with pytest.raises(TypeError, match=r"without the LWFDataModule .*: give datamodule= in place"):
        make_trainer(limit_val_batches=1).validate(module, data.val_dataloader())


class Evaluates(LWFModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/texts", float(len(batch["input_ids"])))

    test_step = validation_step


def test_steps_of_ones_own_may_evaluate_them(
    model_folder: Any, make_trainer: Make, loader: Any
) -> None:
    module = Evaluates(str(model_folder), schedule="never")
    trainer = make_trainer(limit_val_batches=1, max_steps=1, val_check_interval=1)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val/texts"] == 4
    assert trainer.test(module, loader)[0] == {"val/texts": 4}
