"""What is learned, what is forgotten and what is evaluated, from tasks in a folder."""

from __future__ import annotations

import re

import pytest
import torch

from lwf_lightning.data.rows import DataError
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.tasks import TaskFields


def test_learning_texts_are_prompts_with_labelled_answers(make_data):
    data = make_data()
    assert len(data.learning_encoded) == 11
    text = data.learning_encoded[1]
    assert data.tokenizer.decode(text.input_ids) == "Question: qasc 1?\nAnswer: no</s>"
    assert data.tokenizer.decode([label for label in text.labels if label >= 0]) == " no</s>"


def test_forgetting_prompts_are_pooled_and_spread_evenly(make_data):
    data = make_data()
    assert [task for task, _ in data.forgetting_examples] == ["psychol"] * 4 + ["dental"] * 9
    data = make_data(forgetting_prompts=10)
    names = [task for task, _ in data.forgetting_examples]
    assert (names.count("psychol"), names.count("dental")) == (4, 6)


def test_limits_choose_by_seed(make_data):
    def prompts(seed):
        data = make_data(learning_texts=3, forgetting_prompts=4, eval_examples=2, seed=seed)
        assert [len(loader.dataset) for loader in data.val_dataloader()] == [2, 2, 2]
        return data.learning_encoded, data.forgetting_examples

    assert prompts(0) == prompts(0)
    assert prompts(0) != prompts(1)
    assert [len(part) for part in prompts(0)] == [3, 4]


def test_cut_answers_are_counted_in_a_warning(make_data):
    length = len("Question: qasc 1?\nAnswer: no") + 1
    with pytest.warns(UserWarning, match=r"\d+ of 11 gold answers of qasc are longer than data"):
        make_data(forgetting=(), max_length=length)


def test_answer_lost_to_truncation_is_named(make_data, data_dir):
    source = re.escape(f"{data_dir / 'qasc' / 'train.jsonl'}:row 1: ")
    with pytest.raises(DataError, match=source + r".*data\.init_args\.max_length=25"):
        make_data(max_length=25)


def test_bad_row_of_a_forgetting_task_is_named(make_data, data_dir):
    path = data_dir / "dental" / "train.jsonl"
    path.write_text(path.read_text().replace('"dental 4?"', '""'))
    with pytest.raises(DataError, match=re.escape(f"{path}:row 5: field 'question' is empty")):
        make_data()


@pytest.mark.parametrize(
    ("task", "stage", "split", "way_out"),
    [
        ("dental", "fit", "validation", "data.init_args.evaluate_forgetting to false"),
        ("dental", "test", "test", "data.init_args.evaluate_forgetting to false"),
        ("qasc", "fit", "validation", "AscentGuard watches it, with trainer.limit_val_batches=0"),
    ],
)
def test_missing_split_says_what_needs_it(make_data, data_dir, task, stage, split, way_out):
    path = data_dir / task / f"{split}.jsonl"
    path.unlink()
    with pytest.raises(DataError, match=f"{re.escape(str(path))} does not .*{re.escape(way_out)}"):
        make_data(stage=stage)
    if task == "dental":
        assert make_data(stage=stage, evaluate_forgetting=False).eval_tasks == ["qasc"]


# Evaluation


def test_evaluation_loaders(make_data):
    data = make_data(eval_batch_size=2)
    loaders = data.val_dataloader()
    batches = [list(loader) for loader in loaders]
    assert data.eval_tasks == ["qasc", "psychol", "dental"]
    assert [[len(batch) for batch in loader] for loader in batches] == [[2, 1]] * 3
    assert [loader[0].task for loader in batches] == data.eval_tasks
    assert {batch.kind for loader in batches for batch in loader} == {"choice"}
    assert batches[0][0].batch["input_ids"].shape[0] == 6
    assert data.eval_names("val") == [
        "val/accuracy",
        "forget/accuracy_psychol",
        "forget/accuracy_dental",
    ]
    assert data.eval_names("test")[:2] == ["test/accuracy", "test/accuracy_psychol"]


def test_evaluation_by_generation(make_data):
    data = make_data(evaluation="generate", evaluate_forgetting=False)
    (loader,) = data.val_dataloader()
    (batch,) = loader
    assert batch.kind == "generate"
    assert batch.batch["input_ids"].shape[0] == 3


def test_gold_answers_that_can_never_count_as_right_are_counted_in_a_warning(
    make_data, data_dir, write_jsonl_task, recwarn
):
    end = "</s>"  # which a generated answer is read without
    answers = ["One.", "One.\n\nTwo.", "...", "A very long answer.", "Just so long", f"A{end}"]
    rows = [{"prompt": "Why?", "answer": answer} for answer in answers]
    write_jsonl_task(data_dir / "mine", train=rows, validation=rows)
    custom = {"mine": TaskFields()}
    data = make_data("mine", (), custom_tasks=custom, max_new_tokens=len(" Just so long"))
    unread, cut = [str(warning.message) for warning in recwarn]
    source = f"{data_dir / 'mine' / 'validation.jsonl'}:row 2"
    assert unread.startswith(f"3 of 6 gold answers of mine can never count as right: {source} is")
    assert "data.init_args.custom_tasks" in unread
    assert cut.startswith("1 of 6 gold answers of mine are longer than data.init_args.max_new_t")
    data.setup("validate")
    make_data(evaluation="choice", max_new_tokens=1)  # nothing is generated
    assert len(recwarn) == 2
    make_data(evaluation="generate", forgetting=(), max_new_tokens=4)
    assert str(recwarn[-1].message).startswith("1 of 3 gold answers of qasc are longer")


def test_task_without_choices_is_generated(make_data):
    data = make_data("gsm8k", stage="test")
    kinds = [next(iter(loader)).kind for loader in data.test_dataloader()]
    assert kinds == ["generate", "choice", "choice"]


def test_prediction_generates_for_the_learning_task(make_data):
    batches = list(make_data(stage="predict").predict_dataloader())
    assert [(batch.task, batch.kind, len(batch)) for batch in batches] == [("qasc", "generate", 2)]


def test_forgetting_task_with_prompts_only(make_data, data_dir, write_jsonl_task):
    write_jsonl_task(data_dir / "mine", train=[{"text": "Once"}])
    custom = {"mine": TaskFields(prompt="text", answer=None)}
    data = make_data(forgetting=("mine", "dental"), custom_tasks=custom)
    assert data.forgetting_examples[0][1].prompt == "Once"
    assert data.eval_tasks == ["qasc", "dental"]
    assert len(data.val_dataloader()) == 2


def test_evaluation_leaves_the_random_state_alone(make_data):
    data = make_data()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        list(loader)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_real_tasks_mixed(shared_data, make_tokenizer):
    data = LWFDataModule(
        "qasc",
        ["psychol", "dental", "sst5", "gsm8k"],
        data_dir=str(shared_data),
        learning_texts=50,
        forgetting_prompts=40,
        eval_examples=5,
        max_length=2048,
    )
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    assert len(data.learning_encoded) == 50
    names = [task for task, _ in data.forgetting_examples]
    assert {name: names.count(name) for name in names} == dict.fromkeys(data.forgetting_tasks, 10)
    kinds = [next(iter(loader)).kind for loader in data.val_dataloader()]
    assert kinds == ["choice", "choice", "choice", "choice", "generate"]
