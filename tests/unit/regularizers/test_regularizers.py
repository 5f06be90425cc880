from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lwf_lightning.data.batch import Batch, EncodedText, collate, filler
from lwf_lightning.forgetting.gradient_sinks import BLOCK_ELEMENTS
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.packing import text_by_text
from lwf_lightning.regularizers import (
    EWC,
    L2SP,
    BatchSpectralShrinkage,
    build_regularizer,
    head_inputs,
    prompt_features,
)

SIZES = [(1, 5, 1), (2, 7, 2), (6, 7, 3), (7, 7, 1), (9, 4, 4), (13, 5, 2)]


def features(texts: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(texts)
    return torch.randn(texts, hidden, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("texts", "hidden", "count"), SIZES)
def test_bss_is_the_sum_of_the_smallest_squared_singular_values(
    texts: int, hidden: int, count: int
) -> None:
    matrix = features(texts, hidden)
    smallest = torch.linalg.svdvals(matrix)[-count:]
    penalty = BatchSpectralShrinkage(strength=0.3, count=count)
    torch.testing.assert_close(penalty(matrix), 0.3 * smallest.square().sum())
    torch.testing.assert_close(
        penalty(matrix.float()).double(), penalty(matrix), rtol=1e-4, atol=1e-5
    )


def test_bss_of_float32_features_does_not_lose_small_singular_values() -> None:
    left, _ = torch.linalg.qr(features(4, 4))
    right, _ = torch.linalg.qr(features(6, 4))
    values = torch.tensor([900.0, 30.0, 1.0, 0.01], dtype=torch.float64)
    matrix = (left @ values.diag() @ right.T).float().requires_grad_()
    penalty = BatchSpectralShrinkage(strength=1.0, count=1)(matrix)
    penalty.backward()
    smallest = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    expected = 2 * smallest.S[-1] * smallest.U[:, -1:] @ smallest.Vh[-1:]
    torch.testing.assert_close(penalty.double(), smallest.S[-1].square(), rtol=1e-3, atol=0)
    torch.testing.assert_close(matrix.grad, expected.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("texts", "hidden", "count"), SIZES)
def test_the_gradient_of_bss_equals_finite_differences(texts: int, hidden: int, count: int) -> None:
    matrix = features(texts, hidden).requires_grad_()
    assert torch.autograd.gradcheck(BatchSpectralShrinkage(0.3, count), matrix)


def test_bss_has_a_finite_gradient_where_singular_values_are_equal() -> None:
    matrix = (2 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    BatchSpectralShrinkage(1.0, 2)(matrix).backward()
    assert matrix.grad is not None
    assert bool(matrix.grad.isfinite().all())
    torch.testing.assert_close(matrix.grad.square().sum().item(), 2 * 4.0**2)  # two directions


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bss_of_a_feature_that_is_not_finite_is_not_finite(value: float) -> None:
    # the step is then skipped and counted, as with any loss; torch's eigenvalues would raise
    matrix = features(3, 5)
    matrix[1, 2] = value
    matrix.requires_grad_()
    penalty = BatchSpectralShrinkage()(matrix)
    assert not bool(penalty.isfinite())
    penalty.backward()
    assert matrix.grad is not None
    assert not bool(matrix.grad.isfinite().all())


def test_bss_refuses_more_singular_values_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"3 texts with 5 features each have 3 .* but count is 4"):
        BatchSpectralShrinkage(count=4)(features(3, 5))
    with pytest.raises(ValueError, match="have 2 singular values"):
        BatchSpectralShrinkage(count=3)(features(5, 2))


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (3, 5), "cube": (4, 1, 3), "vector": (4,), "scalar": (), "none": (0, 5)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("elements", [1, 7, 2**19])
@pytest.mark.parametrize("pull", [L2SP(0.3), EWC(0.3)])
def test_pulls_equal_their_formula_and_its_gradient(
    pull: L2SP | EWC, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", elements)
    base, fisher = weights(1), {name: f.square() for name, f in weights(2).items()}
    before = weights(3)
    parameters = {name: torch.nn.Parameter(w) for name, w in weights(0).items()}

    def penalty(*values: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for (name, start), value in zip(base.items(), values, strict=True):
            importance = fisher[name] if pull.needs_fisher else torch.ones_like(start)
            total = total + 0.3 / 2 * (importance * (value - start).square()).sum()
        return total

    assert torch.autograd.gradcheck(penalty, tuple(parameters.values()))
    expected = torch.autograd.grad(penalty(*parameters.values()), list(parameters.values()))
    for name, parameter in parameters.items():
        parameter.grad = before[name].clone()
    found = pull.add_gradient(parameters, base, fisher)
    torch.testing.assert_close(found, penalty(*parameters.values()).detach())
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, before[name] + gradient)


def test_a_parameter_that_the_step_does_not_move_is_left_out() -> None:
    base = weights(1)
    parameters = {name: torch.nn.Parameter(w) for name, w in weights(0).items()}
    parameters["vector"].grad = torch.zeros(4, dtype=torch.float64)
    found = L2SP(2.0).add_gradient(parameters, base)
    torch.testing.assert_close(
        found, (parameters["vector"] - base["vector"]).square().sum().detach()
    )
    assert parameters["matrix"].grad is None
    parameters["vector"].grad = None
    torch.testing.assert_close(L2SP(2.0).add_gradient(parameters, base), torch.tensor(0.0))


def test_a_parameter_that_began_to_train_later_is_named() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.zeros(2)
    with pytest.raises(ValueError, match="head did not train when the run began"):
        L2SP().add_gradient({"head": parameter}, {})


def test_a_pull_in_bfloat16_is_as_exact_as_its_weights() -> None:
    base = {"w": torch.full((4096,), 1.0, dtype=torch.bfloat16)}
    parameter = torch.nn.Parameter(torch.full((4096,), 1.0078125, dtype=torch.bfloat16))
    parameter.grad = torch.zeros_like(parameter)
    penalty = L2SP(1.0).add_gradient({"w": parameter}, base)
    torch.testing.assert_close(penalty, torch.tensor(4096 / 2 * 0.0078125**2))


def test_ewc_without_fisher_is_refused() -> None:
    with pytest.raises(ValueError, match="EWC needs the Fisher information"):
        EWC().add_gradient({}, {})


def test_options_reach_the_regularizer_and_unknown_ones_are_named() -> None:
    assert build_regularizer("l2sp", {"strength": 0.5}).strength == 0.5  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="'l2sp' has no option count; it takes strength"):
        build_regularizer("l2sp", {"count": 1})
    with pytest.raises(ValueError, match="unknown regularizer 'bbs'; choose one of bss, l2sp, ewc"):
        build_regularizer("bbs")
    with pytest.raises(ValueError, match=r"'srs' is an empty slot: .* could not be found"):
        build_regularizer("srs")
    for name in ("bss", "l2sp", "ewc"):
        with pytest.raises(ValueError, match="strength must be above 0"):
            build_regularizer(name, {"strength": 0.0})
    for count in (0, 1.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="count must be a whole number"):
            build_regularizer("bss", {"count": count})


def last_prompt_states(model: Any, texts: list[EncodedText]) -> Tensor:
    """Each text alone, without padding, through the model's own list of hidden states."""
    rows = []
    for text in texts:
        ids = torch.tensor([text.input_ids])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        first = next(i for i, label in enumerate(text.labels) if label != -100)
        rows.append(states[0, first - 1])
    return torch.stack(rows)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("way", ["all positions", "some columns", "one row"])
def test_features_are_the_states_at_the_last_prompt_token(
    way: str, count: int, make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model, texts = make_llama().double(), make_texts(count)
    fillers = [filler(texts[0])] * (count > 1)
    batch: Batch = collate([*fillers, *texts, *fillers], 0)
    in_one_row = text_by_text(model, batch) if way == "one row" else nullcontext()
    with in_one_row, head_inputs(model) as hidden, torch.no_grad():
        if way == "all positions":  # as with an architecture that cannot keep some logits only
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        else:
            labelled_tokens(model, batch)
    found = prompt_features(hidden[0], batch)
    with torch.no_grad():
        expected = last_prompt_states(model, texts)
    torch.testing.assert_close(found, expected)
