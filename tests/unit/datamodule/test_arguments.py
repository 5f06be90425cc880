"""Arguments that are refused, with the flag to change; the command line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.cli import LightningCLI

from lwf_lightning.data.rows import DataError
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.tasks import TaskFields


@pytest.mark.parametrize(
    "flag",
    [
        "max_length",
        "batch_size",
        "eval_batch_size",
        "forget_batch_size",
        "learning_texts",
        "forgetting_prompts",
        "eval_examples",
        "max_new_tokens",
        "elicit_batch_size",
    ],
)
def test_numbers_below_one_name_their_flag(flag):
    for value in (0, -3):
        message = f"data.init_args.{flag} must be at least 1, got {value}"
        with pytest.raises(ValueError, match=re.escape(message)):
            LWFDataModule("qasc", **{flag: value})


@pytest.mark.parametrize("flag", ["num_workers", "seed"])
def test_negative_numbers_name_their_flag(flag):
    with pytest.raises(ValueError, match=f"data.init_args.{flag} must be at least 0, got -1"):
        LWFDataModule("qasc", **{flag: -1})


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="unknown task 'qasq'; known: gsm8k, qasc"):
        LWFDataModule("qasq")
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        LWFDataModule("qasc", ["nope"])


def test_forgetting_task_equal_to_the_learning_task_warns():
    with pytest.warns(UserWarning, match=r"data\.init_args\.forgetting_tasks holds the learning"):
        data = LWFDataModule("qasc", ["dental", "qasc"])
    assert data.eval_names("val") == ["val/accuracy", "forget/accuracy_dental"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LWFDataModule("qasc", ["dental"])


def test_forgetting_task_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a task twice"):
        LWFDataModule("qasc", ["dental", "dental"])


def test_learning_task_needs_answers():
    custom = {"mine": TaskFields(answer=None)}
    with pytest.raises(ValueError, match="'mine' has no field with gold answers"):
        LWFDataModule("mine", custom_tasks=custom)


def test_missing_data_dir_names_the_flag(make_tokenizer):
    data = LWFDataModule("qasc")
    data.tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"set data\.init_args\.data_dir to the folder that holds"):
        data.setup("fit")


def test_missing_tokenizer_says_what_to_do():
    with pytest.raises(ValueError, match=r"set datamodule\.tokenizer before setup"):
        LWFDataModule("qasc").setup("fit")


class Anything(L.LightningModule):
    pass


def parse(tmp_path: Path, text: str) -> LWFDataModule:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    cli = LightningCLI(
        Anything, LWFDataModule, run=False, subclass_mode_data=True, args=["--config", str(config)]
    )
    return cli.datamodule


def test_a_jsonl_task_needs_field_names_only(tmp_path, write_jsonl_task, make_tokenizer):
    rows = [{"question": "Why?", "solution": "Because"}]
    write_jsonl_task(tmp_path / "mytask", train=rows, validation=rows)
    data = parse(
        tmp_path,
        f"""
data:
  class_path: lwf_lightning.LWFDataModule
  init_args:
    learning_task: mytask
    data_dir: {tmp_path}
    custom_tasks:
      mytask:
        prompt: question
        answer: solution
        prompt_template: "Q: {{prompt}}\\nA:"
""",
    )
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    text = data.learning_encoded[0]
    assert data.tokenizer.decode(text.input_ids) == "Q: Why?\nA: Because</s>"


def test_wrong_choice_in_the_configuration_is_refused(tmp_path, capsys):
    text = "{class_path: lwf_lightning.LWFDataModule, init_args: {learning_task: a, source: web}}"
    with pytest.raises(SystemExit):
        parse(tmp_path, f"data: {text}")
    assert "source" in capsys.readouterr().err
