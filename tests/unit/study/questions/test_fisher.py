"""Scores without a matrix against scores with one, and how rankings are compared."""

from __future__ import annotations

import itertools

import pytest
import torch

from lwf_lightning.data.batch import collate
from lwf_lightning.forgetting import diagonal_fisher, forgetting_confidence
from lwf_lightning.forgetting.weights import trainable_parameters
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.study.questions.fisher import (
    PARTS,
    area_under_roc,
    of_unit_length,
    products,
    rank_correlation,
    shared_top,
    text_gradients,
    with_drawn_labels,
)


def some(rows: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, count, generator=generator, dtype=torch.float64)
        for name, count in (("a", 3), ("b", 5), ("c", 1))
    }


@pytest.mark.parametrize("part", PARTS)
def test_products_are_those_with_the_matrix_itself(part: str) -> None:
    learning, own = some(7, 0), some(4, 1)
    difference = {name: row[0] for name, row in some(1, 2).items()}
    a, g, d = (torch.cat(list(rows.values()), dim=-1) for rows in (learning, own, difference))
    fisher = a.T @ a / len(a)
    if part == "diagonal":
        fisher = fisher.diag().diag()
    if part == "block":
        blocks = [rows.T @ rows / len(rows) for rows in learning.values()]
        fisher = torch.block_diag(*blocks)
    alignment, sensitivity = products(learning, own, difference, part)
    torch.testing.assert_close(alignment, g @ fisher @ d)
    torch.testing.assert_close(sensitivity, torch.einsum("ti,ij,tj->t", g, fisher, g))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("text_step", ["unit", "gradient"])
def test_the_diagonal_by_single_gradients_is_that_of_the_method(
    text_step: str, reduction: str, make_llama, make_texts
) -> None:
    model = make_llama()
    learning, own = ([collate([t], 0) for t in make_texts(5, seed=seed)] for seed in (0, 1))
    anchor = {name: p.detach() * 0.9 for name, p in trainable_parameters(model).items()}
    fisher = diagonal_fisher(model, learning, reduction=reduction)
    expected = forgetting_confidence(
        model, own, fisher=fisher, anchor=anchor, alpha=2.0, text_step=text_step,
        reduction=reduction,
    )  # fmt: skip
    difference = {n: (p.detach() - anchor[n]).flatten() for n, p in model.named_parameters()}
    of_texts = text_gradients(model, own, reduction)
    if text_step == "unit":
        of_texts = of_unit_length(of_texts)
        norms = torch.cat([*of_texts.values()], dim=1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    of_learning = text_gradients(model, learning, reduction)
    found = products(of_learning, of_texts, difference, "diagonal")
    torch.testing.assert_close(found[0].float(), expected.alignment, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found[1].float(), expected.sensitivity, rtol=1e-4, atol=1e-12)
    assert model.training


def test_labels_are_drawn_where_there_are_labels(make_llama, make_texts) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # one token is certain
    text = collate(make_texts(1), 0)
    drawn = with_drawn_labels(model, text, torch.Generator().manual_seed(0))
    wanted = text["labels"][:, 1:] != -100
    assert ((drawn["labels"][:, 1:] != -100) == wanted).all()
    certain = labelled_tokens(model, text).logits.argmax(-1)
    torch.testing.assert_close(drawn["labels"][:, 1:][wanted], certain)


def test_area_counts_pairs_in_the_right_order() -> None:
    scores = [0.3, 0.1, 0.3, 0.9, 0.2]
    wanted = [True, False, False, True, False]
    pairs = [
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        for i, j in itertools.product(range(5), repeat=2)
        if wanted[i] and not wanted[j]
    ]
    assert area_under_roc(scores, wanted) == pytest.approx(sum(pairs) / len(pairs))


def test_rankings_are_compared_by_order_alone() -> None:
    first = [0.1, 0.2, 0.3, 0.4]
    assert rank_correlation(first, [1.0, 4.0, 9.0, 16.0]) == pytest.approx(1)
    assert rank_correlation(first, [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert shared_top(first, [9.0, 1.0, 2.0, 8.0], 0.5) == 0.5
    assert shared_top(first, first, 0.25) == 1
