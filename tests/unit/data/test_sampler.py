from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.data.sampler import (
    ResumableLoader,
    batch_indices,
    even_shares,
    filled_indices,
    pass_order,
    seeded_sample,
)


@pytest.mark.parametrize("n", [8, 9, 11])
def test_a_pass_visits_no_text_twice_and_drops_less_than_a_batch(n):
    size, steps = 4, n // 4
    for first in range(0, 3 * steps, steps):
        seen = [i for step in range(first, first + steps) for i in batch_indices(n, size, 0, step)]
        assert len(seen) == len(set(seen)) == steps * size
        assert set(seen) <= set(range(n))


def test_every_text_has_its_turn():
    counts = Counter(i for step in range(200) for i in batch_indices(11, 4, 3, step))
    assert set(counts) == set(range(11))
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_order_depends_on_seed_and_pass_alone():
    def order(seed, first):
        return [i for step in range(first, first + 5) for i in batch_indices(20, 4, seed, step)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 5)
    assert order(0, 0) != order(1, 0)
    before = torch.get_rng_state()
    pass_order.cache_clear()
    order(0, 0)
    torch.testing.assert_close(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_global_batch_of_one_process(world_size):
    for step in range(7):
        one = batch_indices(25, 4 * world_size, 5, step)
        ranks = [batch_indices(25, 4, 5, step, rank, world_size) for rank in range(world_size)]
        assert [rank[place] for place in range(4) for rank in ranks] == one


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size"), [(3, 8, 1), (5, 4, 2), (1, 4, 2), (2, 4, 3), (5, 1, 7)]
)
def test_few_texts_are_shared_without_repeats_and_batches_filled_up(n, batch_size, world_size):
    for step in range(5):
        arguments = [(n, batch_size, 0, step, rank, world_size) for rank in range(world_size)]
        shares = [batch_indices(*a) for a in arguments]
        assert sorted(i for share in shares for i in share) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        filled = [filled_indices(*a) for a in arguments]
        assert len({len(batch) for batch in filled}) == 1
        assert [[i for i in batch if i < n] for batch in filled] == shares


def test_a_rank_without_a_text_gets_a_filler_without_labels():
    texts = [EncodedText((5, 6, 7), (-100, 6, 7))]
    loader = ResumableLoader(texts, 2, 0, partial(collate, pad_token_id=0), rank=1, world_size=2)
    (batch,) = loader
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["labels"].tolist() == [[-100, -100]]


@pytest.mark.parametrize(
    "arguments", [(0, 4, 0, 0), (4, 0, 0, 0), (4, 2, 0, -1), (4, 2, 0, 0, 2, 2)]
)
def test_impossible_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="no batch for n="):
        batch_indices(*arguments)


def test_even_shares():
    assert even_shares([5, 5, 5], 7) == [2, 2, 3]
    assert even_shares([1, 9], 6) == [1, 5]
    assert even_shares([1, 2], 100) == [1, 2]
    assert even_shares([], 3) == []


def test_seeded_sample_keeps_order_and_depends_on_the_seed():
    items = list(range(50))
    chosen = seeded_sample(items, 10, seed=0)
    assert chosen == sorted(chosen)
    assert len(set(chosen)) == 10
    assert chosen == seeded_sample(items, 10, seed=0) != seeded_sample(items, 10, seed=1)
    assert seeded_sample(items, None, seed=0) == seeded_sample(items, 99, seed=0) == items


def loader(n=11, **options):
    texts = [EncodedText((i, 1), (-100, 1)) for i in range(n)]
    return ResumableLoader(texts, 4, 0, first_ids, **options)


def first_ids(texts):
    return [text.input_ids[0] for text in texts]


def run(data, batches):
    """As many batches as asked for, over the ends of passes."""
    out = []
    while len(out) < batches:
        for batch in data:
            out.append(batch)
            if len(out) == batches:
                break
    return out


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_with_the_very_next_batch(stopped_after, num_workers):
    whole = run(loader(), 8)
    first = loader(num_workers=num_workers)
    assert run(first, stopped_after) == whole[:stopped_after]
    second = loader(num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert run(second, 8 - stopped_after) == whole[stopped_after:]


def test_loader_follows_batch_indices_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    data = loader()
    assert len(data) == 2
    assert run(data, 5) == [batch_indices(11, 4, 0, step) for step in range(5)]
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert data.state_dict() == {"step": 5}
