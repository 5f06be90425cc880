"""The trainer's own entry points, and flags of Lightning's beside its defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from lwf_lightning.callbacks import StepCheckpoint, ValidateFirst
from lwf_lightning.trainer import LWFTrainer

Make = Callable[..., Any]


@pytest.mark.parametrize("limit", [{"max_steps": 2}, {"max_steps": -1, "max_epochs": 1}])
@pytest.mark.parametrize("schedule", ["never", "periodic"])
def test_a_finished_runs_checkpoint_is_scored_anew(
    schedule: str,
    limit: dict[str, int],
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
) -> None:
    def score(name: str, **fisher: Any) -> list[dict[str, Any]]:
        online = make_callback(anchor="online", refresh_interval=1, **fisher)
        trainer, output = make_trainer(callbacks=[online], **limit), tmp_path / name
        last = run.checkpoint_callback.best_model_path
        trainer.score(make_module(), make_data(), ckpt_path=last, output=str(output))
        return [json.loads(line) for line in output.read_text().splitlines()]

    run = make_trainer(callbacks=[make_callback()], limit_train_batches=2, **limit)
    run.fit(make_module(schedule=schedule), make_data())
    few, all_of_them = score("few.jsonl"), score("all.jsonl", forgetting_rate=1.0)
    assert sum(row["selected"] for row in few) == -(-len(few) // 8)
    assert all(row["selected"] for row in all_of_them)
    assert [row["confidence"] for row in few] == [row["confidence"] for row in all_of_them]


def test_without_a_batch_to_begin_with_nothing_is_scored(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[make_callback()], limit_train_batches=0)
    with pytest.raises(ValueError, match=r"nothing was scored: .*limit_train_batches"):
        trainer.score(make_module(), make_data(), output=str(tmp_path / "scores.jsonl"))


def test_barebones_trains_and_writes_nothing(
    make_module: Make,
    make_data: Make,
    make_callback: Make,
    empty_working_folder: Path,
) -> None:
    module, fisher = make_module(schedule="ahead", ahead_steps=1), make_callback(save_tensors=False)
    trainer = LWFTrainer(barebones=True, max_steps=1, accelerator="cpu", callbacks=[fisher])
    trainer.fit(module, make_data())
    assert trainer.global_step == module.unlearning_steps == 1
    assert list(empty_working_folder.iterdir()) == []


@pytest.mark.parametrize("entry", ["score", "elicit"])
def test_a_trainer_that_has_scored_or_elicited_fits_as_a_new_one_does(
    entry: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
) -> None:
    def trainer() -> LWFTrainer:
        callbacks = [make_callback(), ValidateFirst()]
        return make_trainer(max_steps=4, callbacks=callbacks, limit_val_batches=1)

    def table(fitted: LWFTrainer) -> str:
        fitted.fit(make_module(), make_data())
        assert fitted.global_step == 4
        assert list((fitted.run_folder / "checkpoints").iterdir())
        assert list((fitted.run_folder / "fisher").iterdir())
        return (fitted.run_folder / "metrics.csv").read_text()

    used, new = trainer(), trainer()
    fresh = table(new)  # whose run takes the folder that both were made with
    getattr(used, entry)(make_module(), make_data(), output=str(tmp_path / "rows.jsonl"))
    assert table(used) == fresh
    last = used.checkpoint_callback.best_model_path
    more = trainer()
    more.score(make_module(), make_data(), ckpt_path=last, output=str(tmp_path / "rows.jsonl"))
    assert table(more) == fresh


@pytest.mark.parametrize("order", ["before", "behind", "of the module"])
def test_best_is_what_model_checkpoint_has_chosen_wherever_it_stands(
    order: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "best", every_n_train_steps=2)
    given = {"before": [best, StepCheckpoint()], "behind": [StepCheckpoint(), best]}
    trainer = make_trainer(max_steps=3, limit_val_batches=1, callbacks=given.get(order))
    module, data = make_module(schedule="never"), make_data()
    if order == "of the module":
        monkeypatch.setattr(module, "configure_callbacks", lambda: [best])
    trainer.fit(module, data)
    trainer.validate(module, data, ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == best.best_model_path
    assert "step=2" in best.best_model_path


@pytest.mark.parametrize("schedule", ["never", "periodic"])
@pytest.mark.parametrize("by_tuner", [True, False])
@pytest.mark.parametrize(
    ("finder", "method", "instead"),
    [
        (LearningRateFinder, "lr_find", r"model\.init_args\.learning_rate"),
        (BatchSizeFinder, "scale_batch_size", r"model\.init_args\.tokens_per_pass"),
    ],
)
def test_lightnings_finders_are_refused_by_name(
    finder: Callable[[], Any],
    method: str,
    instead: str,
    by_tuner: bool,
    schedule: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
) -> None:
    trainer = make_trainer(callbacks=[make_callback(), *([] if by_tuner else [finder()])])
    begin = getattr(Tuner(trainer), method) if by_tuner else trainer.fit
    with pytest.raises(ValueError, match=rf"{finder.__name__} \(Tuner\.{method}\) .*{instead}"):
        begin(make_module(schedule=schedule), datamodule=make_data())


def test_a_finder_of_ones_own_may_begin_outside_a_fit(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    class Later(BatchSizeFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

    trainer = make_trainer(max_steps=1, callbacks=[Later()])
    trainer.fit(make_module(schedule="never"), make_data())
    assert trainer.global_step == 1
