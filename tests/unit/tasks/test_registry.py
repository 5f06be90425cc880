from __future__ import annotations

import re

import pytest

from lwf_lightning.data.rows import DataError
from lwf_lightning.tasks import TASK_NAMES, TaskFields, get_task, load_rows

PAPER = ("gsm8k", "qasc", "sst5", "dental", "psychol")


def test_the_tasks_of_the_paper_are_built_in():
    assert set(PAPER) < set(TASK_NAMES)
    for name in TASK_NAMES:
        assert get_task(name).name == name


def test_unknown_name_lists_the_known_ones_and_the_way_to_define_one():
    with pytest.raises(ValueError, match="unknown task 'qasq'") as error:
        get_task("qasq", {"mine": TaskFields()})
    for part in (*TASK_NAMES, "mine", "data.init_args.custom_tasks", "{qasq: {prompt: <field>"):
        assert part in str(error.value)


def test_custom_task():
    task = get_task("mine", {"mine": TaskFields(prompt="q")})
    assert task.name == "mine"


def test_custom_task_with_a_built_in_name_is_refused():
    with pytest.raises(ValueError, match=r"data\.init_args\.custom_tasks: 'qasc' is a built-in"):
        get_task("gsm8k", {"qasc": TaskFields()})


def test_load_rows_finds_the_folder(tmp_path, write_jsonl_task):
    write_jsonl_task(tmp_path / "qasc", train=[{"a": 1}])
    write_jsonl_task(tmp_path / "elsewhere", train=[{"a": 2}])
    assert load_rows(get_task("qasc"), "train", data_dir=tmp_path)[0].fields == {"a": 1}
    mine = get_task("mine", {"mine": TaskFields(folder=str(tmp_path / "elsewhere"))})
    for options in ({}, {"data_dir": tmp_path}, {"source": "hub"}):
        assert load_rows(mine, "train", **options)[0].fields == {"a": 2}


def test_load_rows_without_a_folder_names_the_flags():
    message = "set data.init_args.data_dir to the folder that holds qasc/test.jsonl"
    with pytest.raises(DataError, match=re.escape(message)):
        load_rows(get_task("qasc"), "test")


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("choice_style", ["text", "letters"])
def test_real_rows_read_back_as_their_reference(shared_data, name, choice_style):
    task = get_task(name, choice_style=choice_style)
    for split in ("train", "validation", "test"):
        examples = task.examples(load_rows(task, split, data_dir=shared_data))
        assert len(examples) > 60
        for example in examples:
            assert task.read_answer(example.answer) == example.reference != ""
            assert task.read_answer(example.answer + task.stop[0] + " more: 5") == example.reference


def test_real_numbers_are_those_of_the_source(shared_data):
    task = get_task("gsm8k")
    rows = load_rows(task, "test", data_dir=shared_data)
    for row, example in zip(rows, task.examples(rows), strict=True):
        assert example.reference == row.text("final").replace(",", "")
        assert "<<" not in example.answer
        assert "####" not in example.answer
