"""Runs that unlearn or retain less than their configuration says: it is said before they begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from peft import LoraConfig

Make = Callable[..., Any]


@pytest.fixture
def warnings_of(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    recwarn: pytest.WarningsRecorder,
) -> Make:
    """Runs a fit; gives what it warned of about forgetting, and its unlearning steps."""

    def run(
        model: dict[str, Any], callback: dict[str, Any] | None, **trainer: Any
    ) -> tuple[list[str], int]:
        recwarn.clear()
        module = make_module(**model)
        callbacks = [] if callback is None else [make_callback(**callback)]
        make_trainer(callbacks=callbacks, **trainer).fit(module, make_data())
        said = [str(warning.message) for warning in recwarn]
        words = ("unlearn", "forgotten", "retain")
        return [text for text in said if any(word in text for word in words)], (
            module.unlearning_steps
        )

    return run


LATE = {"anchor": "online", "refresh_interval": 5}


@pytest.mark.parametrize(
    ("model", "callback", "trainer", "message"),
    [
        ({"unlearning_interval": 4}, {}, {"max_steps": 4}, "unlearning_interval 4, and the run"),
        # 24 texts in batches of 4
        ({"unlearning_interval": 6}, {}, {"max_steps": -1, "max_epochs": 1}, "the run has 6"),
        ({"unlearning_interval": 2}, LATE, {"max_steps": 5}, "refresh_interval 5"),
        ({"unlearning_interval": 4}, LATE, {"max_steps": 7}, "refresh_interval 5"),
    ],
)
def test_a_run_in_which_no_step_unlearns_says_so(
    model: dict[str, Any],
    callback: dict[str, Any],
    trainer: dict[str, Any],
    message: str,
    warnings_of: Make,
) -> None:
    said, steps = warnings_of(model, callback, **trainer)
    assert steps == 0
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize(
    ("model", "callback", "trainer"),
    [
        ({"unlearning_interval": 4}, {}, {"max_steps": 5}),
        ({"unlearning_interval": 6}, {}, {"max_steps": -1, "max_epochs": 2}),
        ({"unlearning_interval": 5}, LATE, {"max_steps": 6}),
        ({"schedule": "ahead", "ahead_steps": 1, "unlearning_retain": 1.0}, {}, {"max_steps": 1}),
    ],
)
def test_a_run_that_unlearns_says_nothing(
    model: dict[str, Any], callback: dict[str, Any], trainer: dict[str, Any], warnings_of: Make
) -> None:
    said, steps = warnings_of(model, callback, **trainer)
    assert steps > 0
    assert said == []


@pytest.mark.parametrize("callback", [None, {"strategy": "all"}])
def test_with_nothing_to_retain_the_run_says_so(
    callback: dict[str, Any] | None, warnings_of: Make
) -> None:
    model = {"schedule": "ahead", "ahead_steps": 1, "without_scores": "use_all"}
    assert warnings_of(model, callback, max_steps=1) == ([], 1)
    said, _ = warnings_of(model | {"unlearning_retain": 1.0}, callback, max_steps=1)
    assert len(said) == 1
    assert "unlearning_retain has nothing to retain" in said[0]


def test_a_threshold_that_no_text_reaches_is_named(warnings_of: Make) -> None:
    callback = {"strategy": "threshold", "threshold": 1e9}
    said, steps = warnings_of({"unlearning_interval": 2}, callback, max_steps=3)
    assert steps == 0
    assert len(said) == 1
    assert "no text's confidence reaches FisherCallback's threshold 1000000000.0" in said[0]


def test_a_checkpoint_that_is_past_what_was_ahead_says_so(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    file = str(tmp_path / "plain.ckpt")
    trainer = make_trainer(max_steps=2)
    trainer.fit(make_module(schedule="never"), make_data())
    trainer.save_checkpoint(file)
    ahead = make_module(schedule="ahead", ahead_steps=2)
    trainer = make_trainer(max_steps=4, callbacks=[make_callback()])
    trainer.fit(ahead, make_data(), ckpt_path=file)
    assert ahead.unlearning_steps == 0
    said = [str(warning.message) for warning in recwarn]
    (text,) = [text for text in said if "no step of this run unlearns" in text]
    assert "4 learning steps, 2 of which a checkpoint has brought along" in text


def test_a_second_fit_of_a_trainer_says_what_begins_anew(
    make_module: Make, make_data: Make, make_trainer: Make, recwarn: pytest.WarningsRecorder
) -> None:
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    module = make_module(schedule="ahead", ahead_steps=1, without_scores="use_all")
    trainer, data = make_trainer(max_steps=4, callbacks=[Enough()]), make_data()
    trainer.fit(module, data)
    assert not [warning for warning in recwarn if "fitted before" in str(warning.message)]
    trainer.fit(module, data)
    said = [str(warning.message) for warning in recwarn]
    assert any("4 learning steps, 2 of which an earlier fit of this trainer has" in t for t in said)
    (text,) = [text for text in said if "fitted before" in text]
    assert "its steps count on from 2, but data, learning rate and forgetting begin anew" in text
    assert "ckpt_path='last'" in text


def test_a_checkpoint_of_all_weights_is_none_of_an_adapter(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    file = str(tmp_path / "whole.ckpt")
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(schedule="never"), make_data())
    trainer.save_checkpoint(file)
    adapter = make_module(schedule="never", lora=LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"made without model.init_args.lora: leave it out, or"):
        make_trainer(max_steps=2).fit(adapter, make_data(), ckpt_path=file)
