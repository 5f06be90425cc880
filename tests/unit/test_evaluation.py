"""Models whose positions end: what they read and generate has to fit before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lwf_lightning import AscentGuard, LWFModule
from lwf_lightning.data.rows import DataError

Make = Callable[..., Any]
POSITIONS = 14  # prompts have up to 6 tokens


@pytest.fixture
def make_gpt2(model_folder: Path, tmp_path: Path) -> Make:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2
    )
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lambda **options: LWFModule(str(folder), **options)


def test_the_guards_continuations_fit_the_model(
    make_gpt2: Make, make_data: Make, make_trainer: Make
) -> None:
    guard = AscentGuard(fluency_interval=1)  # asks for 32 tokens
    trainer = make_trainer(max_steps=1, callbacks=[guard])
    module = make_gpt2(schedule="ahead", ahead_steps=2, without_scores="use_all")
    trainer.fit(module, make_data())
    assert guard.state.base_fluency is not None
    assert module.unlearning_steps == 2


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_answers_that_may_exceed_the_positions_are_refused_before_anything_runs(
    make_gpt2: Make,
    make_data: Make,
    make_trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    module, data = make_gpt2(schedule="never"), make_data(max_new_tokens=12)
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        monkeypatch.setattr(module, step, lambda *_: pytest.fail("it has run"))
    trainer = make_trainer(limit_val_batches=None)
    message = rf"jsonl:row \d+: .*data\.init_args\.max_new_tokens=12.* {POSITIONS} positions"
    with pytest.raises(DataError, match=message):
        getattr(trainer, stage)(module, datamodule=data)


def test_what_is_not_generated_needs_no_room(
    make_gpt2: Make, make_data: Make, make_trainer: Make
) -> None:
    options = {"max_new_tokens": 12}
    make_trainer(max_steps=1).fit(make_gpt2(schedule="never"), make_data(**options))
    trainer = make_trainer(max_steps=1, limit_val_batches=None, val_check_interval=1)
    trainer.fit(make_gpt2(schedule="never"), make_data(evaluate_forgetting=False, **options))
    assert "val/accuracy" in trainer.callback_metrics


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_answers_that_just_fit_are_generated(
    make_gpt2: Make, make_data: Make, make_trainer: Make, stage: str
) -> None:
    trainer = make_trainer(limit_val_batches=None)
    data = make_data(evaluation="generate", max_new_tokens=POSITIONS - 6)
    assert getattr(trainer, stage)(make_gpt2(), datamodule=data)


def lengthened(folder: Path, **words: int) -> str:
    """Tasks of choices whose last row of a split has a prompt of so many words."""
    for task in ("learn", "forget"):
        (folder / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            counts = [2, 3, words.get(split, 4)]
            fields = {"choices": ["w2", "w3"], "label": 0, "answer": "w2"}
            rows = [{"prompt": "w1 " * count, **fields} for count in counts]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.mark.parametrize(
    ("split", "stage", "limit", "message"),
    [
        ("train", "fit", 0, r"1 of 3 learning texts of learn .* up to 32 tokens"),
        ("validation", "fit", None, r"validation\.jsonl:row 3: .* 31 tokens"),
        ("validation", "validate", None, r"validation\.jsonl:row 3: .* 31 tokens"),
        ("test", "test", None, r"test\.jsonl:row 3: .* 31 tokens"),
    ],
)
def test_texts_longer_than_the_positions_are_refused_before_anything_runs(
    make_gpt2: Make,
    make_data: Make,
    make_trainer: Make,
    tmp_path: Path,
    split: str,
    stage: str,
    limit: int | None,
    message: str,
) -> None:
    folder = lengthened(tmp_path / "long", **{split: 30})
    data = make_data(data_dir=folder, evaluate_forgetting=False)
    data.elicit_self_knowledge = lambda _: pytest.fail("it has elicited")
    module = make_gpt2(without_scores="use_all")
    trainer = make_trainer(limit_val_batches=limit)
    way_out = rf"{message}.* {POSITIONS} positions.*data\.init_args\.max_length=512"
    with pytest.raises(DataError, match=way_out):
        getattr(trainer, stage)(module, datamodule=data)


def test_texts_that_just_fit_are_learned(
    make_gpt2: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    folder = lengthened(tmp_path / "long", train=POSITIONS - 2)  # with answer and end of text
    make_trainer(max_steps=2).fit(make_gpt2(schedule="never"), make_data(data_dir=folder))
