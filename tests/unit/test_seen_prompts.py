"""Validation on the very prompts that are elicited, beside those that are not."""

from __future__ import annotations

import pytest


def test_seen_prompts_are_those_that_are_elicited(make_module, make_data, make_trainer) -> None:
    module, data = (
        make_module(schedule="never"),
        make_data(evaluate_seen=True, forgetting_prompts=7),
    )
    trainer = make_trainer(max_steps=1, limit_val_batches=None)
    trainer.fit(module, data)
    assert data.eval_names("val") == [
        "val/accuracy",
        "forget/accuracy_forget",
        "forget/seen_accuracy_forget",
    ]
    assert data.eval_names("test") == ["test/accuracy", "test/accuracy_forget"]
    _, unseen, seen = data.val_dataloader()
    prompts = [example.prompt for batch in seen for example in batch.examples]
    assert prompts == [example.prompt for _, example in data.forgetting_examples]
    assert len(prompts) == 7
    assert sum(len(batch) for batch in unseen) == 6
    trainer.validate(module, data, verbose=False)
    assert 0 <= trainer.callback_metrics["forget/seen_accuracy_forget"] <= 1


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_seen_prompts_need_no_unseen_ones(make_module, make_data, stage: str) -> None:
    data = make_data(evaluate_seen=True, evaluate_forgetting=False)
    data.tokenizer = make_module().tokenizer
    data.setup(stage)
    loaders = data.val_dataloader()
    assert [{batch.task for batch in loader} for loader in loaders] == [{"learn"}, {"forget"}]
    assert sum(len(batch) for batch in loaders[1]) == 24
