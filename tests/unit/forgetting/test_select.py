from __future__ import annotations

import pytest
import torch

from lwf_lightning.forgetting.select import select_forget_set

CONFIDENCE = torch.tensor([0.3, -1.0, 2.5, 0.3, 7.0, -4.0, 0.0])


def test_highest_takes_the_top_share_rounded_up_with_ties_in_order() -> None:
    assert select_forget_set(CONFIDENCE, forgetting_rate=0.5).tolist() == [4, 2, 0, 3]


def test_a_tiny_rate_still_takes_one_text() -> None:
    assert select_forget_set(CONFIDENCE, forgetting_rate=1e-6).tolist() == [4]
    assert select_forget_set(torch.tensor([1.0]), forgetting_rate=0.1).tolist() == [0]


@pytest.mark.parametrize(("rate", "count"), [(0.07, 7), (0.14, 14), (0.29, 29), (0.291, 30)])
def test_a_rate_that_is_a_whole_number_of_texts_takes_no_more(rate: float, count: int) -> None:
    assert len(select_forget_set(torch.arange(100.0), forgetting_rate=rate)) == count


def test_lowest_takes_the_other_end() -> None:
    chosen = select_forget_set(CONFIDENCE, strategy="lowest", forgetting_rate=0.4)
    assert sorted(chosen.tolist()) == [1, 5, 6]


def test_all_is_everything_in_order_of_confidence() -> None:
    chosen = select_forget_set(CONFIDENCE, strategy="all")
    assert chosen.tolist() == [4, 2, 0, 3, 6, 1, 5]


def test_threshold_takes_what_reaches_it() -> None:
    chosen = select_forget_set(CONFIDENCE, strategy="threshold", threshold=0.3)
    assert chosen.tolist() == [4, 2, 0, 3]
    assert select_forget_set(CONFIDENCE, strategy="threshold", threshold=99.0).tolist() == []


def test_random_follows_its_seed_and_ignores_confidence() -> None:
    first = select_forget_set(CONFIDENCE, strategy="random", forgetting_rate=0.5, seed=3)
    again = select_forget_set(-CONFIDENCE, strategy="random", forgetting_rate=0.5, seed=3)
    assert len(first) == 4
    assert set(first.tolist()) == set(again.tolist())
    others = {
        frozenset(
            select_forget_set(
                CONFIDENCE, strategy="random", forgetting_rate=0.5, seed=seed
            ).tolist()
        )
        for seed in range(10)
    }
    assert len(others) > 3


def test_a_constant_changes_no_ranking() -> None:
    for strategy in ("highest", "lowest"):
        torch.testing.assert_close(
            select_forget_set(CONFIDENCE, strategy=strategy),
            select_forget_set(CONFIDENCE + 8, strategy=strategy),
        )


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"forgetting_rate must lie in \(0, 1\]"):
        select_forget_set(CONFIDENCE, forgetting_rate=rate)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="one value per text"):
        select_forget_set(torch.tensor([]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        select_forget_set(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="only with it"):
        select_forget_set(CONFIDENCE, threshold=1.0)
    with pytest.raises(ValueError, match="only with it"):
        select_forget_set(CONFIDENCE, strategy="threshold")
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        select_forget_set(CONFIDENCE, strategy="threshold", threshold=float("nan"))
    with pytest.raises(ValueError, match="unknown selection strategy"):
        select_forget_set(CONFIDENCE, strategy="best")  # type: ignore[arg-type]
