"""What a learning step minimizes beside its loss: two interfaces, one file per regularizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lwf_lightning.forgetting.gradient_sinks import block_elements
from lwf_lightning.shards import local, ranks_of_shards


class FeaturePenalty(ABC):
    """A penalty on the features of a step's whole batch, differentiated by autograd.

    A text's feature is what the head reads at its last prompt token: the last hidden state, after
    the final norm.
    """

    @abstractmethod
    def __call__(self, features: Tensor) -> Tensor:
        """The penalty.

        Args:
            features: Shape (texts, hidden size), of all texts of the step.

        Returns:
            A scalar, to be minimized.
        """


class WeightPull:
    """A quadratic pull of the weights towards the base model's.

    strength / 2 * sum over i of importance[i] * (theta[i] - theta_base[i])^2. Its gradient is added
    as it is, without autograd: a block of rows at a time, on each process's own shard.

    Args:
        strength: Factor, above 0.

    Attributes:
        needs_fisher: Whether ``importance`` is the Fisher information; otherwise it is 1.
    """

    needs_fisher: ClassVar[bool] = False

    def __init__(self, strength: float) -> None:
        self.strength = check_strength(strength)

    @torch.no_grad()
    def add_gradient(
        self,
        parameters: Mapping[str, nn.Parameter],
        base: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Adds the pull's gradient to the parameters' own.

        Args:
            parameters: What trains, by name. One without a gradient is not moved by the step,
                and left out.
            base: Their weights in the base model.
            fisher: Their Fisher information, for a pull with ``needs_fisher``.

        Returns:
            The penalty, a scalar, at least 0, the same on every process.

        Raises:
            ValueError: If there is no base weight of a parameter, or no Fisher information where
                it is needed.
        """
        if self.needs_fisher and fisher is None:
            raise ValueError(f"{type(self).__name__} needs the Fisher information as `fisher`")
        penalty = torch.zeros((), device=next(iter(parameters.values())).device)
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            if name not in base:
                raise ValueError(
                    f"{name} did not train when the run began, so that there is nothing to pull it "
                    "to: set model.init_args.regularizer to null, or let it train from the start"
                )
            held = [parameter, base[name], parameter.grad]
            if self.needs_fisher and fisher is not None:
                held.append(fisher[name])
            for weight, start, gradient, *importance in _blocks([local(one) for one in held]):
                moved = _wide(weight) - _wide(start)
                pull = moved * self.strength
                for factor in importance:
                    pull *= factor
                gradient.add_(pull)
                penalty = penalty + (pull * moved).sum() / 2
        return ranks_of_shards(parameters.values()).sum(penalty)


def check_strength(strength: float) -> float:
    """Returns ``strength``, or raises ``ValueError`` unless it is above 0."""
    if not strength > 0:
        raise ValueError(f"strength must be above 0, got {strength}")
    return strength


def _blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors of one shape, few enough to stay in cache: views of them.

    Split as they are and not as matrices, which of a gradient that is not contiguous are copies.
    """
    tensors = [tensor if tensor.ndim else tensor.reshape(1) for tensor in tensors]
    first = tensors[0]
    most = max(1, block_elements(first) * len(first) // max(1, first.numel()))
    return zip(*(torch.split(tensor, most) for tensor in tensors), strict=True)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: a small move is a difference of nearby numbers."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
