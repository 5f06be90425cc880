from __future__ import annotations

import re

import pytest

from lwf_lightning.data.rows import DataError, Row
from lwf_lightning.tasks import Example, TaskFields, get_task, task_from_fields

ROW = Row(
    {"question": "Where do beads come from?", "choices": ["cold", "Vapor rising."], "label": 1},
    "qasc/train.jsonl:row 2",
)


def test_choice_task_in_text_style():
    assert get_task("qasc").example(ROW) == Example(
        prompt="Question: Where do beads come from?\nAnswer:",
        answer=" Vapor rising.",
        choices=(" cold", " Vapor rising."),
        label=1,
        reference="vapor rising",
        source="qasc/train.jsonl:row 2",
    )


def test_choice_task_in_letters_style():
    example = get_task("qasc", choice_style="letters").example(ROW)
    assert example.prompt == (
        "Question: Where do beads come from?\n(A) cold\n(B) Vapor rising.\nAnswer:"
    )
    assert example.choices == (" The answer is (A).", " The answer is (B).")
    assert (example.answer, example.reference) == (" The answer is (B).", "B")


def test_sentiment_prompt():
    task = get_task("sst5")
    assert task.example(ROW).prompt == "Review: Where do beads come from?\nSentiment:"
    assert task.stop == ("\nReview:",)


@pytest.mark.parametrize(
    ("generated", "read"),
    [
        (" Vapor  rising.", "vapor rising"),
        ("\n vapor rising\nand more", "vapor rising"),
        (" cold\nQuestion: What?\nAnswer: x", "cold"),
        ("", ""),
        ("\nQuestion: What?", ""),
    ],
)
def test_reading_a_text_choice(generated, read):
    assert get_task("qasc").read_answer(generated) == read


@pytest.mark.parametrize(
    ("generated", "read"),
    [
        (" The answer is (C).", "C"),
        ("(A) fits. The answer is (A). No: the answer is (b)", "B"),
        ("So the answer is: D", "D"),
        (" D) rain", "D"),
        (" (C) rain", "C"),
        ("the answer is a dog", ""),
        ("I do not know", ""),
        (" The answer is (C).\nQuestion: x\nAnswer: The answer is (A).", "C"),
    ],
)
def test_reading_a_letter(generated, read):
    assert get_task("qasc", choice_style="letters").read_answer(generated) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "field 'question' must be text, got null"),
        ({"question": "  "}, "field 'question' is empty"),
        ({"choices": ["a"]}, "field 'choices' must hold at least 2 texts"),
        ({"label": 2}, "field 'label' must be 0 to 1, got 2"),
        ({"label": "B"}, "field 'label' must be a whole number, got str"),
    ],
)
def test_bad_rows_name_file_row_and_field(changes, message):
    with pytest.raises(DataError, match=re.escape(f"qasc/train.jsonl:row 2: {message}")):
        get_task("qasc").example(Row({**ROW.fields, **changes}, ROW.source))


@pytest.mark.parametrize("field", ["question", "choices", "label"])
def test_missing_field_is_named(field):
    fields = {name: value for name, value in ROW.fields.items() if name != field}
    with pytest.raises(DataError, match=f"row 2: field '{field}' is missing"):
        get_task("qasc").example(Row(fields, ROW.source))


def test_too_many_choices_for_letters():
    many = Row({**ROW.fields, "choices": [str(i) for i in range(27)]}, "f:row 1")
    assert len(get_task("qasc").example(many).choices) == 27
    with pytest.raises(DataError, match="27 choices, too many for one letter each"):
        get_task("qasc", choice_style="letters").example(many)


def test_task_without_choices():
    fields = TaskFields("question", "solution", prompt_template="Q: {prompt}\nA:")
    task = task_from_fields("mine", fields)
    row = Row({"question": "Of {prompt}?", "solution": "Line one.\nLine two."}, "f:row 1")
    example = task.example(row)
    assert example.prompt == "Q: Of {prompt}?\nA:"
    assert example.answer == " Line one.\nLine two."
    assert task.read_answer(example.answer + "\nQ: next") == example.reference
    assert (task.has_choices, task.has_answers) == (False, True)
    with pytest.raises(DataError, match="f:row 1: field 'solution' is missing"):
        task.example(Row({"question": "x"}, "f:row 1"))


def test_prompt_only_task_needs_no_answer():
    task = task_from_fields("prompts", TaskFields(answer=None))
    assert task.example(Row({"prompt": "x"}, "f:row 1")) == Example("x", "", source="f:row 1")
    assert not task.has_answers


def test_space_goes_to_the_answer_but_a_line_break_stays():
    def example(template):
        return task_from_fields("t", TaskFields(prompt_template=template)).example(
            Row({"prompt": "x", "answer": "y"}, "")
        )

    assert (example("{prompt} is: ").prompt, example("{prompt} is: ").answer) == ("x is:", " y")
    assert (example("{prompt}\n\n").prompt, example("{prompt}\n\n").answer) == ("x\n\n", "y")


def test_stop_texts():
    def stop(**fields):
        return task_from_fields("t", TaskFields(**fields)).stop

    assert stop() == ("\n\n",)
    assert stop(prompt_template="### In: {prompt}") == ("\n### In:",)
    few = "Answer briefly.\nQ: 1+1?\nA: 2\n\nQ: {prompt}\nA:"  # a model goes on with one question
    assert stop(prompt_template=few) == ("\nQ:",)
    assert stop(prompt_template="Do it.\n\n### In:\n{prompt}\n### Out:") == ("\n### In:",)
    assert stop(stop=["END", "\n"]) == ("END", "\n")
    assert stop(stop=[]) == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_template": "Question:"}, "prompt_template must contain {prompt}"),
        ({"choices": "options"}, "names both fields, choices and label"),
        ({"label": "right"}, "names both fields, choices and label"),
        ({"stop": [""]}, "a stop text must not be empty"),
    ],
)
def test_bad_fields_name_the_flag(fields, message):
    with pytest.raises(ValueError, match=re.escape("data.init_args.custom_tasks: mine")) as error:
        task_from_fields("mine", TaskFields(**fields))
    assert message in str(error.value)
