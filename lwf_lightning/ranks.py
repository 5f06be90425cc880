"""The processes of a run: how they share out work, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Every method but :meth:`share` has to be called by all ranks, in the same order. With one
    process nothing is sent, and everything is returned as it came.

    Attributes:
        rank: This process, from 0.
        world_size: Number of processes, at least 1.

    Example:
        >>> Ranks(1, 2).share("abcde")
        'bd'
        >>> Ranks().merge(["a", "b"])
        ['a', 'b']
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of something that every rank holds: every ``world_size``-th item."""
        return items[self.rank :: self.world_size]

    def merge(self, share: Sequence[T]) -> list[T]:
        """The whole again, in order, from the :meth:`share` of every rank."""
        shares = self.gather(share)
        whole: list[T] = []
        for place in range(max(len(part) for part in shares)):
            whole.extend(part[place] for part in shares if place < len(part))
        return whole

    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank; anything that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, value: Callable[[], T]) -> T:
        """What the function returns on rank 0, where alone it is called."""
        if self.world_size == 1:
            return value()
        values = [value() if self.is_first else None]
        distributed.broadcast_object_list(values)
        return values[0]  # type: ignore[return-value]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same on each, in the tensor's own type and in its place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors of every rank the values they have on rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                if not isinstance(tensor, DTensor):  # of which each rank has a part of its own
                    distributed.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sums the gradients over all ranks; a rank without one adds nothing.

        Where no rank has one there is none afterwards: zeros would have an optimizer decay it.
        """
        if self.world_size == 1:
            return
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters])
        counts = self.sum(has_gradient.to(parameters[0].device, torch.int32)).tolist()
        whole = [
            parameter
            for parameter, count in zip(parameters, counts, strict=True)
            if count and not isinstance(parameter, DTensor)
        ]
        for parameter in whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sent = [distributed.all_reduce(p.grad, async_op=True) for p in whole]
        for parameter in parameters:
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                parameter.grad *= self.world_size  # FSDP2 has averaged them
        for handle in sent:
            handle.wait()

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, stacked along a new first axis."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(tensors, tensor.contiguous())
        return torch.stack(tensors)

    def wait(self) -> None:
        """Goes on once all ranks have come here."""
        if self.world_size > 1:
            distributed.barrier()
