from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import batches_of
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting import gradient_sinks
from lwf_lightning.forgetting.confidence import (
    ForgettingConfidence,
    automatic_alpha,
    forgetting_confidence,
)
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss

ARCHITECTURES = ["llama", "llama_tied", "gpt2", "gemma", "qwen2", "gpt_neox", "lora"]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("reduction", "text_step"), [("mean", "gradient"), ("sum", "gradient"), ("mean", "unit")]
)
def test_it_equals_the_formula(
    name: str, reduction: Any, text_step: Any, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts, alpha = oracle.make_model(name), make_texts(12), 0.1
    learning = make_texts(5, seed=1)
    fisher = diagonal_fisher(model, batches_of(learning, 3, oracle.PAD))
    anchor = oracle.nearby_weights(model)

    scores = forgetting_confidence(
        model,
        batches_of(texts, 5, oracle.PAD),
        fisher=fisher,
        anchor=anchor,
        alpha=alpha,
        text_step=text_step,
        reduction=reduction,
    )

    expected = oracle.confidence_oracle(model, texts, fisher, anchor, alpha, reduction, text_step)
    base = dict(model.named_parameters())
    constant = sum(
        (fisher[key].double() * (base[key].detach().double() - anchor[key].double()) ** 2).sum()
        for key in fisher
    )
    torch.testing.assert_close(scores.constant, constant.item() / 2, rtol=1e-5, atol=0)
    ranked = expected - constant / 2
    assert scores.confidence.dtype == torch.float32
    torch.testing.assert_close(
        scores.confidence.double(), ranked, rtol=1e-5, atol=1e-5 * ranked.abs().max().item()
    )
    assert rank_correlation(scores.confidence, ranked) > 0.9999


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_both_terms_equal_the_loop_at_any_batch_and_block_size(
    name: str,
    oracle: ModuleType,
    make_texts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, texts = oracle.make_model(name), make_texts(7)
    fisher = oracle.fisher_oracle(model, texts)
    anchor = oracle.nearby_weights(model)
    base = {key: parameter.detach().double() for key, parameter in model.named_parameters()}
    alignment, sensitivity = [], []
    for text in oracle.text_gradients(model, texts):
        alignment.append(
            sum((fisher[k] * (base[k] - anchor[k].double()) * g).sum() for k, g in text.items())
        )
        sensitivity.append(sum((fisher[k] * g * g).sum() for k, g in text.items()))
    alignment, sensitivity = torch.stack(alignment), torch.stack(sensitivity)

    for batch_size, elements in [(1, 2**18), (3, 1), (3, 16 * 3), (7, 50)]:
        monkeypatch.setitem(gradient_sinks.BLOCK_ELEMENTS, "cpu", elements)
        scores = forgetting_confidence(
            model,
            batches_of(texts, batch_size, oracle.PAD),
            fisher=fisher,
            anchor=anchor,
            text_step="gradient",
        )
        torch.testing.assert_close(
            scores.alignment.double(),
            alignment,
            rtol=1e-5,
            atol=1e-5 * alignment.abs().max().item(),
        )
        torch.testing.assert_close(scores.sensitivity.double(), sensitivity, rtol=1e-5, atol=0)


@pytest.mark.parametrize("texts", [1, 3])
def test_sums_over_millions_of_weights_stay_exact(texts: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2048, 1024, bias=False)
    batch = {"features": torch.rand(texts, 2, 2048), "weights": torch.rand(texts, 2, 1024)}
    fisher, anchor = torch.rand(1024, 2048), model.weight.detach() - torch.rand(1024, 2048)

    scores = forgetting_confidence(
        model,
        [batch],
        fisher={"weight": fisher},
        anchor={"weight": anchor},
        text_loss=lambda m, b: (m(b["features"]) * b["weights"]).sum(dim=(1, 2)),
        text_step="gradient",
    )

    gradients = batch["weights"].double().mT @ batch["features"].double()
    difference = model.weight.detach().double() - anchor.double()
    for found, expected in [
        (scores.alignment, (fisher * difference * gradients).sum(dim=(1, 2))),
        (scores.sensitivity, (fisher * gradients**2).sum(dim=(1, 2))),
    ]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_an_anchor_at_the_base_leaves_the_sensitivity(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(4)
    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD))
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    scores = forgetting_confidence(
        model, batches_of(texts, 4, oracle.PAD), fisher=fisher, anchor=base
    )

    assert scores.constant == 0
    assert not scores.alignment.any()
    assert scores.alpha == 1
    torch.testing.assert_close(scores.confidence, scores.sensitivity / 2)


def test_a_gradient_step_that_leads_to_the_anchor_lowers_confidence(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(1)
    gradient = next(iter(oracle.text_gradients(model, texts)))
    step = {n: p.detach() - 0.1 * gradient[n].float() for n, p in model.named_parameters()}
    fisher = {name: torch.ones_like(value) for name, value in step.items()}

    for text_step, alpha in (("gradient", 0.1), ("unit", 0.1 * norm_of(gradient))):
        scores = forgetting_confidence(
            model,
            batches_of(texts, 1, oracle.PAD),
            fisher=fisher,
            anchor=step,
            alpha=alpha,
            text_step=text_step,
        )
        assert scores.alignment.item() > 0
        full = scores.constant + scores.confidence.item()  # the step arrives: FC is 0
        assert full == pytest.approx(0, abs=1e-4 * scores.constant)


def norm_of(gradients: dict[str, Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


def test_a_unit_step_does_not_depend_on_the_scale_of_a_texts_loss(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(3)
    batches = list(batches_of(texts, 3, oracle.PAD))
    fisher, anchor = diagonal_fisher(model, batches), oracle.nearby_weights(model)
    scale = torch.tensor([1.0, 1000.0, 0.0])

    plain, scaled = (
        forgetting_confidence(
            model,
            batches,
            fisher=fisher,
            anchor=anchor,
            alpha=0.1,
            text_loss=lambda m, b, by=by: per_text_loss(m, b) * by,
        )
        for by in (torch.ones(3), scale)
    )

    torch.testing.assert_close(scaled.confidence[:2], plain.confidence[:2], rtol=1e-5, atol=0)
    assert scaled.confidence[2] == 0  # no gradient: it stays at the base weights


def test_confidence_of_the_parts() -> None:
    scores = ForgettingConfidence(
        alignment=torch.tensor([1.0, -1.0]),
        sensitivity=torch.tensor([4.0, 2.0]),
        alpha=0.5,
        constant=7.0,
    )
    torch.testing.assert_close(scores.confidence, torch.tensor([0.0, 0.75]))


def test_automatic_alpha_makes_spreads_a_multiple() -> None:
    generator = torch.Generator().manual_seed(0)
    alignment = 1e-7 * torch.randn(50, generator=generator)
    sensitivity = 3e-9 * torch.rand(50, generator=generator)
    alpha = automatic_alpha(alignment, sensitivity, multiple=10)
    ratio = (alpha**2 / 2 * sensitivity).std() / (alpha * alignment).std()
    assert ratio.item() == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize(
    ("alignment", "sensitivity"),
    [
        ([0.3], [0.2]),
        ([0.0, 0.0], [0.2, 0.4]),
        ([0.1, 0.4], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_automatic_alpha_without_a_spread_is_one(
    alignment: list[float], sensitivity: list[float]
) -> None:
    alpha = automatic_alpha(torch.tensor(alignment), torch.tensor(sensitivity))
    assert alpha == 1
    assert math.isfinite(alpha)


def test_alpha_is_chosen_and_reported(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(5)
    fisher = diagonal_fisher(model, batches_of(texts, 5, oracle.PAD))
    batches = list(batches_of(texts, 5, oracle.PAD))
    anchor = oracle.nearby_weights(model)

    scores = forgetting_confidence(model, batches, fisher=fisher, anchor=anchor)

    assert scores.alpha == automatic_alpha(scores.alignment, scores.sensitivity)


@pytest.mark.parametrize("which", ["fisher", "anchor"])
def test_tensors_that_do_not_fit_are_named(
    which: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("llama")
    batches = list(batches_of(make_texts(2), 2, oracle.PAD))
    given = {key: oracle.nearby_weights(model) for key in ("fisher", "anchor")}

    given[which]["lm_head.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=rf"{which}: lm_head.weight has shape \(3, 3\)"):
        forgetting_confidence(model, batches, **given)
    del given[which]["lm_head.weight"]
    with pytest.raises(ValueError, match=rf"{which}: .* lm_head.weight is missing"):
        forgetting_confidence(model, batches, **given)


def test_a_score_that_is_not_finite_is_named(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama"), make_texts(3)
    huge = {name: torch.full_like(p, 1e36) for name, p in model.named_parameters()}

    with pytest.raises(NonFiniteLossError, match=r"score of text 0 .* not finite"):
        forgetting_confidence(
            model,
            batches_of(texts, 3, oracle.PAD),
            fisher=huge,
            anchor=oracle.nearby_weights(model),
            text_loss=lambda m, b: 1e4 * per_text_loss(m, b),
        )


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_out_of_range_is_refused(
    alpha: float, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("llama")
    weights = oracle.nearby_weights(model)
    with pytest.raises(ValueError, match="alpha must be above 0"):
        forgetting_confidence(model, [], fisher=weights, anchor=weights, alpha=alpha)


def test_scoring_needs_something_that_trains(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        forgetting_confidence(model, batches_of(make_texts(2), 2, 0), fisher={}, anchor={})
