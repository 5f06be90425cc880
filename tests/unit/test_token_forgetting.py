from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lwf_lightning.token_forgetting import (
    TokenForgetting,
    better_tokens,
    build_learning_loss,
    token_forgetting_loss,
)


def draw(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 37])
def test_equals_its_formula_one_token_at_a_time(tokens: int, share: float) -> None:
    losses, quality = draw(tokens, 1), draw(tokens, 2)
    order = sorted(range(tokens), key=lambda i: -float(quality[i]))
    count = max(1, round(share * tokens))
    kept, rest = order[:count], order[count:]
    expected = sum(float(losses[i]) for i in kept) / len(kept)
    if rest:
        expected -= 0.2 * sum(float(losses[i]) for i in rest) / len(rest)
    is_better = better_tokens(quality, share)
    assert sorted(kept) == is_better.nonzero().squeeze(1).tolist()
    found = token_forgetting_loss(losses, is_better, 0.2)
    torch.testing.assert_close(found.item(), expected)


def test_the_gradient_raises_the_rest_and_lowers_the_better() -> None:
    losses = draw(10, 0).requires_grad_()
    is_better = better_tokens(draw(10, 1), 0.7)
    token_forgetting_loss(losses, is_better, 0.3).backward()
    expected = torch.where(is_better, 1 / 7, -0.3 / 3).double()
    torch.testing.assert_close(losses.grad, expected)


def test_tokens_that_are_as_good_are_treated_alike() -> None:
    assert better_tokens(torch.zeros(5), 0.2).all()
    quality = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0])
    assert better_tokens(quality, 0.4).tolist() == [True, False, True, True, False]


def test_quality_is_what_training_has_gained_and_the_weight_moves_over_the_run() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    base = torch.tensor([1.5, 1.0, 9.0, 4.1])  # gains 0.5, -1, 6, 0.1
    rising = TokenForgetting(share_kept=0.5, weight_start=0.0, weight_end=0.4)
    for progress, weight in ((0.0, 0.0), (0.5, 0.2), (1.0, 0.4)):
        found = rising(losses, base, progress)
        torch.testing.assert_close(found, torch.tensor(2.0 - weight * 3.0))
    falling = TokenForgetting(weight_start=0.4, weight_end=0.0)
    assert falling.weight(0.25) == pytest.approx(0.3)
    torch.testing.assert_close(TokenForgetting(1.0)(losses, base, 1.0), losses.mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_kept": 0.0}, r"share_kept must lie in \(0, 1\], got 0.0"),
        ({"share_kept": 1.1}, "share_kept must lie in"),
        ({"weight_end": -0.1}, "weight_end must be at least 0"),
        ({"lambda": 0.1}, "'token_forgetting' has no option lambda; it takes share_kept, weight_"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_learning_loss("token_forgetting", options)


def test_plain_cross_entropy_takes_no_options() -> None:
    assert build_learning_loss("cross_entropy") is None
    with pytest.raises(ValueError, match="'cross_entropy' has no option share_kept; it takes none"):
        build_learning_loss("cross_entropy", {"share_kept": 0.5})


def test_without_a_token_the_loss_is_no_number() -> None:
    """As the plain mean: the step is skipped, and said to be."""
    none = torch.zeros(0)
    is_better = better_tokens(none, 0.7)
    assert is_better.dtype == torch.bool
    assert math.isnan(float(token_forgetting_loss(none, is_better, 0.1)))
