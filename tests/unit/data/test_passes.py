from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lwf_lightning.data.batch import Batch, EncodedText, collate
from lwf_lightning.data.passes import forward_passes, group_by_length, pass_cost, take_texts
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.optimization import labelled_token_count


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


def test_a_pass_costs_more_on_an_accelerator_and_most_for_a_small_model() -> None:
    small, large = pass_cost("cuda", 10**8), pass_cost("cuda", 10**10)
    assert small > large > pass_cost("cpu", 10**8) == pass_cost("cpu", 10**10)


def uneven_batch(make_texts: Callable[..., list[EncodedText]]) -> Batch:
    texts = make_texts(5)
    long = EncodedText((7,) * 30, (-100,) * 21 + (7,) * 9)
    return collate([*texts, long], pad_token_id=0)


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


def padded_loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )


def loss_in_passes(model: Any, batch: Batch, limit: int | None) -> None:
    tokens = labelled_token_count(batch)
    for part in forward_passes(model, batch, limit):
        (labelled_tokens(model, part).token_losses().sum() / tokens).backward()


@pytest.mark.parametrize("limit", [None, 1, 25, 40])  # the longest text has 30 tokens
def test_the_trajectory_is_that_of_one_padded_pass(
    limit: int | None,
    make_llama: Callable[..., Any],
    make_texts: Callable[..., list[EncodedText]],
) -> None:
    batch = uneven_batch(make_texts)
    assert len(forward_passes(make_llama(), batch, limit)) > 1
    models = [make_llama().double().train() for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    for _ in range(5):
        padded_loss(models[0], batch).backward()
        loss_in_passes(models[1], batch, limit)
        one, many = ([p.grad for p in model.parameters()] for model in models)
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    one, many = (list(model.parameters()) for model in models)
    torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("limit", [None, 1])
def test_one_text_is_one_pass(limit: int | None, make_llama: Callable[..., Any]) -> None:
    batch = collate([EncodedText((5, 6, 7), (-100, 6, 7))], 0)
    (part,) = forward_passes(make_llama(), batch, limit)
    torch.testing.assert_close(part, batch)
