from __future__ import annotations

import pytest

from lwf_lightning.metrics.fluency import distinct_ngrams, fluency


def test_ngrams_are_counted_by_hand() -> None:
    loop = [1, 2, 1, 2, 1, 2]
    assert distinct_ngrams(loop, 1) == pytest.approx(2 / 6)
    assert distinct_ngrams(loop, 2) == pytest.approx(2 / 5)
    assert distinct_ngrams(loop, 4) == pytest.approx(2 / 3)
    assert distinct_ngrams([1, 2, 3], 4) == 1.0
    assert distinct_ngrams([], 1) == 1.0


def test_a_loop_is_less_fluent_and_a_shared_answer_is_not() -> None:
    varied, loop = list(range(20)), [3] * 20
    assert fluency([varied]).repetition == 0
    assert fluency([loop]).repetition == pytest.approx(16 / 17)
    assert fluency([loop]).distinct_1 == pytest.approx(1 / 20)
    assert fluency([varied, varied]) == fluency([varied])
    assert fluency([loop, varied]).distinct_2 == pytest.approx((1 / 19 + 1) / 2)


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no text"):
        fluency([])
