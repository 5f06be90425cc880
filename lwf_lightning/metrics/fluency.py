"""Fluency of generated texts: how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


def distinct_ngrams(tokens: Sequence[int], size: int) -> float:
    """Share of a text's n-grams that are different: above 0 to 1, higher is more varied.

    1 for a text too short to hold any. One minus it is seq-rep-n (arXiv 1908.04319).

    Args:
        tokens: Token ids of one text.
        size: Tokens of an n-gram, at least 1.

    Example:
        >>> distinct_ngrams([7, 8, 7, 8], 1)
        0.5
        >>> round(distinct_ngrams([7, 8, 7, 8], 2), 3)  # 78, 87, 78
        0.667
    """
    ngrams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


@dataclass(frozen=True)
class Fluency:
    """How much generated texts repeat themselves, each within itself; means over texts.

    Texts are not compared with each other: a task whose answers are all "yes" is no loss of
    fluency. It cannot tell sense from nonsense, and an empty text counts as varied.

    Attributes:
        repetition: Share of 4-grams that came before in the text (seq-rep-4): 0 to below 1, lower
            is better.
        distinct_1: Share of tokens that are different, above 0 to 1, higher is better.
        distinct_2: Share of pairs of tokens that are different, above 0 to 1, higher is better.
    """

    repetition: float
    distinct_1: float
    distinct_2: float


def fluency(texts: Sequence[Sequence[int]]) -> Fluency:
    """Measures generated texts.

    Args:
        texts: Token ids of each text, without its prompt.

    Raises:
        ValueError: If there is no text.

    Example:
        >>> fluency([[5, 5, 5, 5, 5], [5, 6, 7, 8, 9]])
        Fluency(repetition=0.25, distinct_1=0.6, distinct_2=0.625)
    """
    if not texts:
        raise ValueError("there is no text to measure the fluency of")
    one, two, four = (fmean(distinct_ngrams(text, size) for text in texts) for size in (1, 2, 4))
    return Fluency(repetition=1 - four, distinct_1=one, distinct_2=two)
