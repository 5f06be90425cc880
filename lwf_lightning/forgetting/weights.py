"""The trainable weights of a model as a plain mapping: copied, and exchanged without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name and parameter of everything that trains; tied parameters once, by their first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies the trainable weights; one tensor of the parameter's shape and dtype per name."""
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the model back the weights that :func:`copy_weights` kept."""
    for name, parameter in trainable_parameters(model).items():
        parameter.copy_(weights[name])


@torch.no_grad()
def relative_change(model: nn.Module, before: Mapping[str, Tensor]) -> float:
    """How far the trainable weights have moved, as a share of their norm before.

    Returns:
        Norm of the difference over the norm of ``before``: 0 to inf, in float32.
    """
    parameters = trainable_parameters(model)
    moved = sum((p - before[name]).float().square().sum() for name, p in parameters.items())
    whole = sum(before[name].float().square().sum() for name in parameters)
    return float((moved / whole) ** 0.5)


@contextmanager
def exchanged_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Runs the model with other weights; no tensor is copied.

    Inside the context ``weights`` holds what the model held before, and the model holds what
    ``weights`` held. Both are exchanged back at the end, also after an exception.

    Args:
        model: The model whose trainable weights are exchanged.
        weights: A tensor per trainable parameter, of its shape, dtype and device.

    Yields:
        ``weights``, now holding the model's own weights.

    Raises:
        ValueError: If a name or a shape does not fit the model.
    """
    parameters = trainable_parameters(model)
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ValueError(f"the weights do not name the model's trainable parameters: {odd[:3]}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)} in the model, "
                f"{tuple(weights[name].shape)} in the weights"
            )
    _exchange(parameters, weights)
    try:
        yield weights
    finally:
        _exchange(parameters, weights)


def _exchange(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data, weights[name] = weights[name], parameter.data
