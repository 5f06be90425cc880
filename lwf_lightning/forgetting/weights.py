"""The trainable weights of a model as a plain mapping: copied, and exchanged without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lwf_lightning.shards import local, ranks_of_shards, reshard


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name and parameter of everything that trains; tied parameters once, by their first name."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def required_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same, and ``ValueError`` if nothing trains."""
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter: all of them are frozen")
    return parameters


@torch.inference_mode(False)
@torch.no_grad()
def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies the trainable weights; one tensor of the parameter's shape and dtype per name."""
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the model back the weights that :func:`copy_weights` kept."""
    for name, parameter in trainable_parameters(model).items():
        parameter.copy_(weights[name])
    torch.clear_autocast_cache()  # it may hold casts of the weights before


@torch.no_grad()
def relative_change(model: nn.Module, before: Mapping[str, Tensor]) -> float:
    """How far the trainable weights have moved, as a share of their norm before.

    Returns:
        Norm of the difference over the norm of ``before``: 0 to inf, in float32 or wider.
    """
    parameters = trainable_parameters(model)
    pairs = [(local(p), local(before[name])) for name, p in parameters.items()]
    moved = torch.stack([_squared_norm(after - start) for after, start in pairs]).sum()
    norms = torch.stack([_squared_norm(start) for _, start in pairs]).sum()
    sums = ranks_of_shards(parameters.values()).sum(torch.stack([moved, norms]))
    return float((sums[0] / sums[1]) ** 0.5)


def _squared_norm(tensor: Tensor) -> Tensor:
    # Not square().sum(): whose squares are another tensor of that size, and most of the time.
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.ndim > 1:  # in parts: over 10^8 numbers one float32 sum is off by some per cent
        tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.square()


@torch.no_grad()
def whole_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded weights, each gathered in the main memory of every process; others as they are."""
    return {
        name: w.full_tensor().cpu() if isinstance(w, DTensor) else w for name, w in weights.items()
    }


@contextmanager
def exchanged_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Runs the model with other weights; no tensor is copied, but the shards of FSDP2.

    Inside the context ``weights`` holds what the model held before, and the model holds what
    ``weights`` held. Both are exchanged back at the end, also after an exception.

    Args:
        model: The model whose trainable weights are exchanged.
        weights: A tensor per trainable parameter, of its shape, dtype and device.

    Yields:
        ``weights``, now holding the model's own weights.

    Raises:
        ValueError: If a name, a shape, a dtype or a device does not fit the model.
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
        places = [f"{tensor.dtype} on {tensor.device}" for tensor in (parameter, weights[name])]
        if places[0] != places[1]:
            raise ValueError(f"{name} is {places[0]} in the model, {places[1]} in the weights")
    exchange(model, weights)
    try:
        yield weights
    finally:
        exchange(model, weights)


@torch.no_grad()
def exchange(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Exchanges the trainable weights of the model and the given ones."""
    for name, parameter in trainable_parameters(model).items():
        if isinstance(parameter, DTensor):  # FSDP2 keeps the memory of its shard: content is moved
            own, other = parameter.to_local(), weights[name].to_local()  # type: ignore[attr-defined]
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)
        else:
            parameter.data, weights[name] = weights[name], parameter.data
    torch.clear_autocast_cache()  # it may hold casts of the weights before
