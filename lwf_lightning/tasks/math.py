"""Grade-school mathematics: a chain of thought that ends in a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from lwf_lightning.data.rows import Row
from lwf_lightning.tasks.base import Example, Task, before_stop

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"((?<![\w.)])-)?\$?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(\.\d+)?")
_ANSWER_IS = re.compile(r"the answer is", re.IGNORECASE)


@dataclass(frozen=True)
class Gsm8k(Task):
    """gsm8k (Cobbe et al. 2021), zero-shot chain of thought in the paper's wording."""

    name: str = "gsm8k"
    stop: tuple[str, ...] = ("\nQuestion:",)

    def example(self, row: Row) -> Example:
        """Formats one row: the rationale without calculator marks, then the number.

        Raises:
            DataError: If ``question`` or ``answer`` is missing, or ``answer`` ends in no number
                after ``####``.
        """
        question = row.text("question")
        rationale, mark, final = row.text("answer").rpartition("####")
        number = read_number(final)
        if not mark or not number or not _NUMBER.fullmatch(final.strip()):
            raise row.error("answer", "must end in '#### ' and a number, such as -1,250.5")
        parts = (_CALCULATOR.sub("", rationale).strip(), f"The answer is {final.strip()}.")
        return Example(
            prompt=f"Question: {question}\nLet's think step by step:",
            answer="".join(f" {part}" for part in parts if part),
            reference=number,
            source=row.source,
        )

    def read_answer(self, generated: str) -> str:
        """The first number after the last "the answer is"; without one, the last number."""
        text = before_stop(generated, self.stop)
        said = _ANSWER_IS.split(text)
        return (read_number(said[-1]) if len(said) > 1 else "") or read_number(text, last=True)


def read_number(text: str, *, last: bool = False) -> str:
    """The first or last number of a text in its shortest form, or an empty text.

    Commas between thousands, dollar signs and trailing zeros go; a minus sign stays unless it
    stands between two numbers.

    Example:
        >>> read_number("It costs $1,250.50 in all."), read_number("-3.0"), read_number("none")
        ('1250.5', '-3', '')
    """
    numbers = [match for match in _NUMBER.finditer(text) if match[2] or match[3]]
    if not numbers:
        return ""
    sign, whole, fraction = numbers[-1 if last else 0].groups(default="")
    value = Decimal(f"{sign}{whole.replace(',', '') or 0}{fraction}")
    shortest = format(value, "f")
    if fraction:
        shortest = shortest.rstrip("0").rstrip(".")
    return "0" if value == 0 else shortest
