from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lwf_lightning.data.batch import collate
from lwf_lightning.losses import LabelledTokens, labelled_tokens, per_text_loss
from lwf_lightning.objectives import OBJECTIVES, build_objective

REFERENCE = torch.tensor([3.0, 9.5, 0.2], dtype=torch.float64)


def tokens() -> LabelledTokens:
    generator = torch.Generator().manual_seed(0)
    return LabelledTokens(
        logits=torch.randn(6, 5, generator=generator, dtype=torch.float64),
        targets=torch.tensor([0, 3, 4, 1, 1, 2]),
        text=torch.tensor([0, 0, 0, 1, 2, 2]),
        texts=3,
    )


def by_hand(name: str) -> list[float]:
    """Each objective, one text and one token at a time, from its formula."""
    data, values = tokens(), []
    for text in range(3):
        rows = [i for i in range(6) if data.text[i] == text]
        nll, hinge = 0.0, 0.0
        for row in rows:
            exponentials = [math.exp(v) for v in data.logits[row].tolist()]
            p = [e / sum(exponentials) for e in exponentials]
            target = int(data.targets[row])
            nll -= math.log(p[target])
            hinge += max(0.0, 1 + p[target] - max(q for v, q in enumerate(p) if v != target))
        mean, reference = nll / len(rows), float(REFERENCE[text])
        values.append(
            {
                "gradient_ascent": -mean,
                "replay": mean,
                "npo": 2 / 0.1 * math.log(1 + math.exp(-0.1 * (nll - reference))),
                "simnpo": 2 / 4.5 * math.log(1 + math.exp(-4.5 * mean)),
                "inverted_hinge": hinge / len(rows),
            }[name]
        )
    return values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_its_formula(name: str) -> None:
    objective = build_objective(name)
    loss = objective(tokens(), REFERENCE if objective.needs_reference else None)
    torch.testing.assert_close(loss.tolist(), by_hand(name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_of_descent_moves_the_text_the_right_way(
    name: str, make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model, batch = make_llama().double(), collate(make_texts(3), 0)
    objective = build_objective(name)

    def reference() -> Tensor:
        return per_text_loss(model, batch, reduction="sum").detach()

    before = reference()
    loss = objective(labelled_tokens(model, batch), before if objective.needs_reference else None)
    loss.mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad / norm
    rises = reference().sum() > before.sum()
    assert bool(rises) == objective.ascends


def test_options_reach_the_objective_and_unknown_ones_are_named() -> None:
    assert build_objective("simnpo", {"beta": 2.0, "delta": 0.5}).delta == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'npo' has no option gamma; it takes beta"):
        build_objective("npo", {"gamma": 1.0})
    with pytest.raises(ValueError, match="has no option beta; it takes none"):
        build_objective("replay", {"beta": 1.0})
    with pytest.raises(ValueError, match="unknown objective 'ascent'; choose one of gradient_asc"):
        build_objective("ascent")
    with pytest.raises(ValueError, match="beta must be above 0"):
        build_objective("npo", {"beta": 0.0})
    for delta in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="delta must be at least 0"):
            build_objective("simnpo", {"delta": delta})
    with pytest.raises(ValueError, match="needs the base model's"):
        build_objective("npo")(tokens())
