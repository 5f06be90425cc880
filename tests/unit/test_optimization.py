from __future__ import annotations

import pytest
import torch
from torch import nn

from lwf_lightning.optimization import build_adamw, can_fuse, clip_gradients, share_moved


def one_step(weight: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    weight.grad = torch.arange(weight.numel()).reshape(weight.shape).to(weight) - 2.0
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_the_fused_step_is_the_plain_one_and_vectors_are_not_decayed(shape: tuple[int]) -> None:
    start = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    fused, plain = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer = build_adamw([fused], learning_rate=0.1, weight_decay=0.3, betas=(0.8, 0.9))
    assert optimizer.param_groups[0]["fused"]
    decay = 0.3 if len(shape) == 2 else 0.0
    by_hand = torch.optim.AdamW([plain], lr=0.1, weight_decay=decay, betas=(0.8, 0.9))
    for _ in range(3):
        torch.testing.assert_close(one_step(fused, optimizer), one_step(plain, by_hand))


def test_where_torch_cannot_fuse_the_plain_step_is_taken() -> None:
    parameters = [nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    assert not can_fuse(parameters)
    optimizer = build_adamw(parameters, learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    assert not optimizer.param_groups[0]["fused"]
    one_step(parameters[0], optimizer)


@pytest.mark.parametrize("max_norm", [0.3, 1e4])
def test_gradients_are_clipped_to_a_norm_that_no_rounding_hides(max_norm: float) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(5_000_001,), (3, 7), (0, 4), (1,)]  # more than a block, and nothing at all
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    before = torch.cat([p.grad.flatten() for p in parameters[:-1]])  # type: ignore[union-attr]
    norm = clip_gradients(parameters, max_norm)
    expected = before.double().square().sum().sqrt()
    torch.testing.assert_close(norm, expected.float(), rtol=1e-7, atol=0)
    after = torch.cat([p.grad.flatten() for p in parameters[:-1]])  # type: ignore[union-attr]
    torch.testing.assert_close(after, before * min(1.0, max_norm / float(expected)))
    assert parameters[-1].grad is None


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    for value in (float("nan"), float("inf")):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([1.0, value])
        assert not torch.isfinite(clip_gradients([weight], 1.0))


@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2])
def test_the_share_of_bfloat16_weights_that_a_step_moves(step: float) -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    spacing = 2.0 ** (weights.float().abs().log2().floor() - 7)  # eight bits, one of them hidden
    expected = (weights.float() + step - weights.float() >= spacing / 2).float().mean()
    assert share_moved([weights], step) == pytest.approx(float(expected), abs=5e-3)
    assert share_moved([weights.float()], step) == 1.0
