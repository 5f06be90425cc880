"""What a task is: how a row becomes prompt and gold answer, and how an answer is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lwf_lightning.data.rows import Row


@dataclass(frozen=True)
class Example:
    """One prompt with its gold answer.

    Attributes:
        prompt: The text the model is given.
        answer: The text it should continue with: leading space included, end-of-text token not.
            Empty where the task has prompts only.
        choices: For choice tasks, all answers on offer, each in the form of ``answer``.
        label: Index of the right choice.
        reference: What a right answer equals once :meth:`Task.read_answer` has read it.
        source: Where the row stands, as in ``qasc/train.jsonl:row 12``.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    reference: str = ""
    source: str = ""


@dataclass(frozen=True)
class Task(ABC):
    """Rows to examples, and generated text to an answer.

    Every task can be scored by exact match of the read answer with ``Example.reference``; a task
    with choices also by the log-likelihood of each choice.

    Attributes:
        name: Name in configurations and logs.
        stop: Texts at which a generated answer ends (the start of the next question).
        folder: Folder of the JSONL files where it is not ``<data_dir>/<name>``.
        has_choices: Whether its examples have ``choices`` and ``label``.
        has_answers: Whether its examples have a gold answer; without, it only serves to forget.
    """

    name: str
    stop: tuple[str, ...]
    folder: Path | None = None
    has_choices: bool = False
    has_answers: bool = True

    @abstractmethod
    def example(self, row: Row) -> Example:
        """Formats one row.

        Raises:
            DataError: If a field is missing or malformed; names file, row and field.
        """

    @abstractmethod
    def read_answer(self, generated: str) -> str:
        """Reads the answer from generated text; empty if there is none to read."""

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """Formats rows, in order."""
        return [self.example(row) for row in rows]


def before_stop(generated: str, stop: Iterable[str]) -> str:
    r"""The part of a generated text before the first stop text in it.

    Example:
        >>> before_stop(" rain\nQuestion: Why?", ["\nQuestion:"])
        ' rain'
    """
    for text in stop:
        generated = generated.partition(text)[0]
    return generated


def plain(text: str) -> str:
    """Text as compared in exact match: lower case, single spaces, no full stop at the end.

    Example:
        >>> plain(" Very  Negative. ")
        'very negative'
    """
    return " ".join(text.casefold().split()).rstrip(".").rstrip()
