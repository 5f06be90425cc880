"""FSDP2: weights that lie in shards on several processes (``torch.distributed.fsdp``).

Each process holds a part of every parameter as a ``DTensor``; a layer is whole only while it
runs. What belongs to a parameter (Fisher, anchor, base weights) is sharded exactly like it. All
processes have to run the model equally often, or they wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from lwf_lightning.data.batch import IGNORE_INDEX, Batch
from lwf_lightning.data.passes import take_texts
from lwf_lightning.ranks import Ranks


def reshard(model: nn.Module) -> None:
    """Lets go of whole layers: FSDP2 keeps the root's after a forward pass without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def settle(model: nn.Module) -> None:
    """Has FSDP2 look anew at what trains.

    It fixes the types of its reductions when it first runs, from what trains then.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def mesh_of(parameters: Iterable[Tensor]) -> DeviceMesh | None:
    """The processes among which parameters are sharded; None if they are not."""
    meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
    if not meshes:
        return None
    mesh = meshes.pop()
    if meshes or mesh.ndim != 1:
        raise ValueError(
            "the parameters are sharded over more than one dimension of processes; only FSDP2 "
            "over one dimension (data parallel alone) is supported"
        )
    return mesh


def ranks_of_shards(parameters: Iterable[Tensor]) -> Ranks:
    """This process among those that hold the shards; alone if the parameters are whole."""
    mesh = mesh_of(parameters)
    return Ranks() if mesh is None else Ranks(mesh.get_local_rank(), mesh.size())


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on every process; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor that every process holds, cut like a parameter if that is sharded."""
    if isinstance(tensor, DTensor) or not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


@contextmanager
def added_by_all(total: Tensor) -> Iterator[Tensor]:
    """Yields what this process may add to; of a sharded tensor each gets the sum for its shard.

    Args:
        total: What is added to. If it is sharded, a whole tensor of zeros is yielded, which lives
            no longer than the context.
    """
    if not isinstance(total, DTensor):
        yield total
        return
    part = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
    yield part
    parts = DTensor.from_local(part, total.device_mesh, [Partial()], run_check=False)
    total.to_local().add_(parts.redistribute(placements=total.placements).to_local())


def highest(number: int, mesh: DeviceMesh) -> int:
    """The highest of the processes' numbers."""
    found = torch.tensor(number, device=mesh.device_type)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group())
    return int(found)


class Round(NamedTuple):
    """What a process does while the others do the same.

    Attributes:
        batch: The batch to run.
        counts: Whether its texts count, or it is run for company.
        most: The most texts that any process has in this round.
    """

    batch: Batch
    counts: bool
    most: int


def rounds(batches: Sequence[Batch], ranks: Ranks, sharded: bool) -> Iterator[Round]:
    """Shares batches out, one to each process at a time.

    Args:
        batches: All batches, the same on every process.
        ranks: The processes.
        sharded: Whether a process without a batch of its own has to run another's for company.
    """
    for start in range(0, len(batches), ranks.world_size):
        together = batches[start : start + ranks.world_size]
        counts = ranks.rank < len(together)
        if counts or sharded:
            most = max(len(next(iter(batch.values()))) for batch in together)
            yield Round(together[ranks.rank if counts else 0], counts, most)


def in_step(passes: Sequence[Batch], parameters: Iterable[Tensor]) -> list[Batch]:
    """Adds passes without labels until every process has as many; if the weights are sharded.

    Args:
        passes: This process's batches, at least one.
        parameters: Those of the model that will see them.
    """
    mesh = mesh_of(parameters)
    if mesh is None:
        return list(passes)
    first = take_texts(passes[0], [0])
    unlabelled = {**first, "labels": torch.full_like(first["labels"], IGNORE_INDEX)}
    return [*passes, *[unlabelled] * (highest(len(passes), mesh) - len(passes))]
