from __future__ import annotations

import pytest

from lwf_lightning.data.rows import DataError, Row
from lwf_lightning.tasks import Example, get_task
from lwf_lightning.tasks.math import read_number

TASK = get_task("gsm8k")


def row(answer):
    return Row({"question": "How many clips?", "answer": answer}, "gsm8k/train.jsonl:row 1")


def test_example():
    answer = "In May: 48/2 = <<48/2=24>>24 clips.\nIn all: 48+24 = <<48+24=72>>72.\n#### 72"
    assert TASK.example(row(answer)) == Example(
        prompt="Question: How many clips?\nLet's think step by step:",
        answer=" In May: 48/2 = 24 clips.\nIn all: 48+24 = 72. The answer is 72.",
        reference="72",
        source="gsm8k/train.jsonl:row 1",
    )


def test_gold_answers_read_as_their_reference():
    for final in ("1,000", "-5", "0", "$12.50", "100"):
        example = TASK.example(row(f"Thinking about 3.\n#### {final}"))
        assert TASK.read_answer(example.answer) == example.reference


def test_an_answer_without_a_rationale_has_one_space_before_it():
    assert TASK.example(row("#### 72")).answer == " The answer is 72."


@pytest.mark.parametrize(
    "answer",
    [
        "It is 72.",
        "Much.\n#### many",
        "Half.\n#### 3/4",
        "A lot.\n#### 1 000 000",
        "####",
        "#### -",
    ],
)
def test_answer_without_a_number_is_named(answer):
    with pytest.raises(DataError, match=r"gsm8k/train\.jsonl:row 1: field 'answer' must end in"):
        TASK.example(row(answer))


@pytest.mark.parametrize(
    ("generated", "read"),
    [
        (" 48+24 = 72. The answer is 72.", "72"),
        ("The answer is 3. Wait, the answer is $1,250.50 in all, not 9.", "1250.5"),
        ("so the ANSWER IS: 18.0", "18"),
        ("He has 5 and then 7 apples", "7"),
        ("He has 12. The answer is twelve.", "12"),
        ("The answer is -3.", "-3"),
        ("It is 10-4=6", "6"),
        ("The answer is 5.\nQuestion: And 9? The answer is 9.", "5"),
        ("no idea", ""),
        ("", ""),
    ],
)
def test_reading(generated, read):
    assert TASK.read_answer(generated) == read


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000,000", "1000000"),
        ("1,2", "1"),
        ("12,3456", "12"),
        (".5", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("$3.10.", "3.1"),
        ("-$4", "-4"),
        ("10-4", "10"),
        ("100", "100"),
        ("20%", "20"),
    ],
)
def test_numbers(text, number):
    assert read_number(text) == number
