"""Tasks that are described by field names alone, so that a user's own data needs no code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Literal, TypeAlias

from lwf_lightning.data.rows import Row
from lwf_lightning.tasks.base import Example, Task, before_stop, plain

ChoiceStyle: TypeAlias = Literal["text", "letters"]

_LETTER_ANSWER = re.compile(r"(?i:the answer is):?\s*(?:\(([A-Za-z])\)|([A-Z])\b)")
_LETTER = re.compile(r"\b([A-Z])\)")


@dataclass(frozen=True)
class TaskFields:
    """A JSONL task, as written under ``data.init_args.custom_tasks``.

    Attributes:
        prompt: Field that holds the prompt.
        answer: Field that holds the gold answer; null where there are prompts only, which is
            enough for a forgetting task. With ``choices``, the right choice is the gold answer and
            this field is not read.
        choices: Field that holds the list of choices, for choice tasks.
        label: Field that holds the index of the right choice, the first being 0.
        prompt_template: What the model is given, with ``{prompt}`` where the field goes.
        stop: Texts at which a generated answer ends. By default the beginning of the next prompt:
            what ``prompt_template`` holds before ``{prompt}`` on a new line, or an empty line.
        folder: Folder with ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``; by default
            ``<data_dir>/<task name>``.
    """

    prompt: str = "prompt"
    answer: str | None = "answer"
    choices: str | None = None
    label: str | None = None
    prompt_template: str = "{prompt}"
    stop: list[str] | None = None
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class FieldsTask(Task):
    """A task made from :class:`TaskFields`; make it with :func:`task_from_fields`."""

    fields: TaskFields
    choice_style: ChoiceStyle = "text"

    def example(self, row: Row) -> Example:
        """Formats one row; see :meth:`Task.example`."""
        question = row.text(self.fields.prompt)
        if self.fields.choices is not None and self.fields.label is not None:
            return self._choice_example(row, question, self.fields.choices, self.fields.label)
        prompt, lead = self._prompt(question)
        if self.fields.answer is None:
            return Example(prompt, "", source=row.source)
        answer = row.text(self.fields.answer)
        return Example(prompt, lead + answer, reference=plain(answer), source=row.source)

    def _choice_example(self, row: Row, question: str, choices: str, label: str) -> Example:
        texts = row.texts(choices)
        right = row.index(label, below=len(texts))
        if self.choice_style == "letters":
            if len(texts) > len(ascii_uppercase):
                raise row.error(
                    choices, f"holds {len(texts)} choices, too many for one letter each"
                )
            letters = ascii_uppercase[: len(texts)]
            listed = [f"({letter}) {text}" for letter, text in zip(letters, texts, strict=True)]
            question = "\n".join([question, *listed])
            texts = tuple(f"The answer is ({letter})." for letter in letters)
            reference = letters[right]
        else:
            reference = plain(texts[right])
        prompt, lead = self._prompt(question)
        answers = tuple(lead + text for text in texts)
        return Example(prompt, answers[right], answers, right, reference, row.source)

    def _prompt(self, question: str) -> tuple[str, str]:
        # The space between prompt and answer belongs to the answer, as in the model's own tokens.
        prompt = self.fields.prompt_template.replace("{prompt}", question).rstrip(" ")
        return prompt, "" if prompt.endswith("\n") else " "

    def read_answer(self, generated: str) -> str:
        """The letter after "the answer is", the first line (choices), or the whole text."""
        text = before_stop(generated, self.stop).strip()
        if not self.has_choices:
            return plain(text)
        if self.choice_style == "text":
            return plain(text.partition("\n")[0])
        found = _LETTER_ANSWER.findall(text)
        if found:
            return "".join(found[-1]).upper()
        first = _LETTER.search(text)
        return first.group(1) if first else ""


def task_from_fields(
    name: str, fields: TaskFields, choice_style: ChoiceStyle = "text"
) -> FieldsTask:
    r"""Makes a task from field names.

    Args:
        name: Name in configurations and logs.
        fields: Where prompt, answer and choices are found.
        choice_style: ``text``: the answer is the text of the choice, scored without listing the
            choices (small models are at chance on listed letters). ``letters``: choices are listed
            as ``(A) ...`` and the answer is ``The answer is (C).``, the paper's style.

    Raises:
        ValueError: If the template has no ``{prompt}``, or only one of ``choices`` and ``label``
            is named.

    Example:
        >>> fields = TaskFields("question", "solution", prompt_template="Q: {prompt}\nA:")
        >>> task = task_from_fields("mine", fields)
        >>> row = Row({"question": "1 + 1?", "solution": "2"}, "train.jsonl:row 1")
        >>> example = task.example(row)
        >>> example.prompt, example.answer, task.stop
        ('Q: 1 + 1?\nA:', ' 2', ('\nQ:',))
    """
    flag = f"data.init_args.custom_tasks: {name}"
    if "{prompt}" not in fields.prompt_template:
        raise ValueError(f"{flag}: prompt_template must contain {{prompt}}")
    if (fields.choices is None) != (fields.label is None):
        raise ValueError(f"{flag}: a choice task names both fields, choices and label")
    if fields.stop is not None and not all(fields.stop):
        raise ValueError(f"{flag}: a stop text must not be empty")
    stop = fields.stop
    if stop is None:
        start = fields.prompt_template.partition("{prompt}")[0].strip().rpartition("\n")[2]
        stop = [f"\n{start}" if start else "\n\n"]
    return FieldsTask(
        name,
        stop=tuple(stop),
        folder=None if fields.folder is None else Path(fields.folder).expanduser(),
        has_choices=fields.choices is not None,
        has_answers=fields.choices is not None or fields.answer is not None,
        fields=fields,
        choice_style=choice_style,
    )
