"""Self-knowledge, the texts that are chosen from it, and their batches."""

from __future__ import annotations

import pytest
import torch

import lwf_lightning.datamodule as datamodule_file
from lwf_lightning.forgetting.elicit import SelfKnowledge
from lwf_lightning.tasks import TaskFields


def test_each_task_is_elicited_with_its_own_stop_texts(
    make_data, data_dir, monkeypatch, tmp_path, make_knowledge, write_jsonl_task
):
    calls = []

    def elicit(model, tokenizer, prompts, **options):
        calls.append({**options, "model": model, "prompts": prompts})
        return make_knowledge(len(prompts))

    monkeypatch.setattr(datamodule_file, "elicit", elicit)
    write_jsonl_task(data_dir / "mine", train=[{"text": "Once"}, {"text": "Then"}])
    data = make_data(
        forgetting=("mine", "gsm8k"),
        custom_tasks={"mine": TaskFields(prompt="text", answer=None)},
        max_new_tokens=7,
        cache_dir=str(tmp_path / "cache"),
    )
    data.elicit_self_knowledge("the model")
    first, second = calls
    assert first["prompts"] == ["Once", "Then"]
    assert (first["tasks"], second["tasks"]) == (["mine"] * 2, ["gsm8k"] * 5)
    assert (first["stop"], second["stop"]) == (("\n\n",), ("\nQuestion:",))
    for asked in calls:
        assert (asked["model"], asked["max_new_tokens"]) == ("the model", 7)
        assert asked["cache_dir"] == str(tmp_path / "cache")
    # each text with the place of its prompt among those of its task
    assert [text.row for text in data.self_knowledge.texts] == [*range(2), *range(5)]
    assert data.self_knowledge.dropped == 0


def test_a_task_that_a_limit_leaves_without_prompts_is_not_asked(
    make_data, monkeypatch, make_knowledge
):
    counts = []

    def elicit(model, tokenizer, prompts, **options):
        counts.append(len(prompts))
        return make_knowledge(len(prompts))

    monkeypatch.setattr(datamodule_file, "elicit", elicit)
    make_data(forgetting_prompts=1).elicit_self_knowledge(None)
    assert counts == [1]


def test_no_texts_left_is_refused(make_data, monkeypatch, make_knowledge):
    def elicit(model, tokenizer, prompts, **options):
        return SelfKnowledge([], dropped=len(prompts))

    monkeypatch.setattr(datamodule_file, "elicit", elicit)
    data = make_data()
    with pytest.raises(ValueError, match=r"no texts are left in D_self: .* 13 prompts of psych"):
        data.elicit_self_knowledge(None)
    assert data.self_knowledge is None


def test_nothing_to_forget_is_refused(make_data, make_knowledge):
    with pytest.raises(ValueError, match=r"name tasks in data\.init_args\.forgetting_tasks"):
        make_data(forgetting=()).elicit_self_knowledge(None)


def test_forget_batches_are_a_pure_function_of_the_step(make_data, make_knowledge):
    data = make_data(forget_batch_size=2)
    assert data.forget_batch(0) is None
    data.self_knowledge = make_knowledge(8)
    assert data.forget_batch(0) is None
    data.set_forget_set([1, 3, 4, 6])

    def answers(step):
        batch = data.forget_batch(step)
        assert batch["labels"].shape == batch["input_ids"].shape
        return sorted(batch["labels"][batch["labels"] >= 50].tolist())

    both = [answers(0), answers(1)]
    assert sorted(both[0] + both[1]) == [51, 53, 54, 56]
    assert [answers(0), answers(1)] == both
    data.set_forget_set(range(0))
    assert data.forget_batch(0) is None


def test_retain_batches_are_the_other_texts(make_data, make_knowledge):
    data = make_data(forget_batch_size=3)
    assert data.retain_batch(0) is None
    data.self_knowledge = make_knowledge(8)
    data.set_forget_set([1, 6])
    labels = [data.retain_batch(step)["labels"] for step in range(2)]
    assert [len(rows) for rows in labels] == [3, 3]
    answers = sorted(rows[rows >= 50].tolist() for rows in labels)
    assert sorted(answers[0] + answers[1]) == [50, 52, 53, 54, 55, 57]
    data.set_forget_set(range(8))
    assert data.retain_batch(0) is None


def test_forget_set_is_checked(make_data, make_knowledge):
    data = make_data()
    with pytest.raises(ValueError, match="elicit the self-knowledge before"):
        data.set_forget_set([0])
    data.self_knowledge = make_knowledge(3)
    for wrong in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="different indices below 3"):
            data.set_forget_set(wrong)
    assert data.forget_set is None
    data.set_forget_set(torch.tensor([2, 0]).tolist())
    assert data.forget_set == [2, 0]


def test_pad_token_falls_back_to_end_of_text(make_data, make_tokenizer):
    data = make_data()
    assert data.tokenizer.pad_token is None
    assert data.pad_token_id == 2
    batch = next(iter(data.train_dataloader()))
    ends = (batch["labels"] == 2).sum(1)
    assert ends.tolist() == [1] * 4  # the real one is labelled, padding is not
    data.tokenizer = make_tokenizer(pad_token="<pad>")
    assert data.pad_token_id == 0
