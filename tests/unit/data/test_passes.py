from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from lwf_lightning.data.batch import Batch, EncodedText, collate
from lwf_lightning.data.passes import fill_rows, group_by_length, pass_cost, take_texts


def divisions(texts: list[int]) -> Iterator[list[list[int]]]:
    """All ways to divide texts into groups."""
    if not texts:
        yield []
        return
    first, rest = texts[0], texts[1:]
    for division in divisions(rest):
        yield [[first], *division]
        for place, group in enumerate(division):
            yield [*division[:place], [first, *group], *division[place + 1 :]]


def price(groups: list[list[int]], lengths: list[int], cost: int) -> int:
    return sum(len(group) * max(lengths[text] for text in group) + cost for group in groups)


def is_allowed(group: list[int], lengths: list[int], limit: int | None) -> bool:
    return len(group) == 1 or not limit or len(group) * max(lengths[i] for i in group) <= limit


@pytest.mark.parametrize("limit", [None, 1, 40, 75])
@pytest.mark.parametrize("cost", [0, 7, 60])
def test_no_other_division_is_cheaper(cost: int, limit: int | None) -> None:
    draw = random.Random(0)
    for texts in range(1, 8):
        lengths = [draw.randint(1, 60) for _ in range(texts)]
        found = group_by_length(lengths, cost, limit)
        assert sorted(text for group in found for text in group) == list(range(texts))
        assert all(is_allowed(group, lengths, limit) for group in found)
        best = min(
            price(groups, lengths, cost)
            for groups in divisions(list(range(texts)))
            if all(is_allowed(group, lengths, limit) for group in groups)
        )
        assert price(found, lengths, cost) == best


def test_long_texts_come_first_and_texts_of_one_length_stay_together() -> None:
    assert group_by_length([3, 400, 3], 10) == [[1], [0, 2]]
    assert group_by_length([9] * 5, 10) == [[0, 1, 2, 3, 4]]
    assert group_by_length([], 10) == []


@pytest.mark.parametrize("limit", [None, 1, 60, 75])
def test_rows_hold_every_text_once_and_two_of_them_would_not_fit_in_one(limit: int | None) -> None:
    draw = random.Random(0)
    for texts in range(8):
        lengths = [draw.randint(1, 60) for _ in range(texts)]
        rows = fill_rows(lengths, limit)
        assert sorted(text for row in rows for text in row) == list(range(texts))
        tokens = [sum(lengths[text] for text in row) for row in rows]
        if limit is None:
            assert len(rows) <= 1
            continue
        assert all(len(row) == 1 or sum_ <= limit for row, sum_ in zip(rows, tokens, strict=True))
        assert all(a + b > limit for a, b in itertools.combinations(tokens, 2))
        assert all(lengths[a] >= lengths[b] for row in rows for a, b in itertools.pairwise(row))


def test_a_pass_costs_more_on_an_accelerator_and_most_for_a_small_model() -> None:
    small, large = pass_cost("cuda", 10**8), pass_cost("cuda", 10**10)
    assert small > large > pass_cost("cpu", 10**8) == pass_cost("cpu", 10**10)


def flipped(batch: Batch) -> Batch:
    """The same texts padded on the left."""
    rows = {key: value.clone() for key, value in batch.items()}
    for text, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for value in rows.values():
            value[text] = value[text].roll(value.shape[1] - length)
    return rows


def test_a_part_holds_its_texts_and_no_needless_padding(
    make_texts: Callable[..., list[EncodedText]],
) -> None:
    texts = make_texts(4)
    batch = collate([*texts, EncodedText((7,) * 30, (7,) * 30)], 0)
    part, expected = take_texts(batch, [1, 3]), collate([texts[1], texts[3]], 0)
    torch.testing.assert_close(part, expected)
    torch.testing.assert_close(take_texts(flipped(batch), [1, 3]), flipped(expected))


def test_a_part_holds_what_else_the_batch_says_of_its_texts(
    make_texts: Callable[..., list[EncodedText]],
) -> None:
    batch = collate([*make_texts(2), EncodedText((7,) * 30, (7,) * 30)], 0)
    weights, features = torch.tensor([0.5, 1.0, 2.0]), torch.arange(6.0).view(3, 2)
    part = take_texts({**batch, "weight": weights, "feature": features}, [0, 1])
    torch.testing.assert_close(part["weight"], weights[:2])
    torch.testing.assert_close(part["feature"], features[:2])
    assert part["input_ids"].shape[1] < 30
