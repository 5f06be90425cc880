"""The only place that knows one process, DDP and FSDP2 from each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn

from lwf_lightning.fsdp2 import check_sharded, shard_model
from lwf_lightning.ranks import Ranks

if TYPE_CHECKING:
    import lightning as L

_HIDES = {
    "fsdp": "FSDPStrategy cannot do manual optimization (Lightning #19685)",
    "deepspeed": "DeepSpeed hides the gradients that have to be clipped and skipped",
}


def ranks_of(trainer: L.Trainer | None) -> Ranks:
    """This process among those of the trainer; alone without one."""
    return Ranks() if trainer is None else Ranks(trainer.global_rank, trainer.world_size)


def fsdp2_lines(world_size: int) -> str:
    """What to write into a configuration to shard the model with FSDP2."""
    return (
        "trainer: {strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy, "
        f"init_args: {{data_parallel_size: {world_size}, tensor_parallel_size: 1}}}}}}"
    )


def check_strategy_flag(strategy: str | Strategy, world_size: int) -> None:
    """Refuses by name what Lightning could not even build on every machine.

    Args:
        strategy: ``trainer.strategy`` as given.
        world_size: Number of processes, for the advice.

    Raises:
        ValueError: For FSDPStrategy and DeepSpeed; shows the lines that shard with FSDP2 instead.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    for prefix, reason in _HIDES.items():
        if name.lower().startswith(prefix):
            raise ValueError(
                f"trainer.strategy {name} is not supported: {reason}. To shard the model, use "
                f"FSDP2, with data_parallel_size the number of processes: {fsdp2_lines(world_size)}"
            )


def check_precision_flag(precision: str | int | None) -> None:
    """Refuses float16, for which on a CPU Lightning would take bfloat16 instead.

    Args:
        precision: ``trainer.precision`` as given.

    Raises:
        ValueError: For float16, mixed or not.
    """
    if str(precision).startswith("16"):
        raise ValueError(
            f"trainer.precision {precision} is not supported: its loss scaling does not reach "
            "unlearning steps. Set it to bf16-mixed or bf16-true"
        )


def check_strategy(trainer: L.Trainer) -> None:
    """Refuses a strategy under which the run would be wrong, before anything is loaded.

    Raises:
        ValueError: Names the flag, and what to set instead.
    """
    strategy = trainer.strategy
    name, world_size = type(strategy).__name__, trainer.num_devices * trainer.num_nodes
    check_strategy_flag(strategy, world_size)
    check_precision_flag(trainer.precision)
    if strategy.root_device.type == "mps":
        raise ValueError(
            "trainer.accelerator mps is not supported: scores and norms are summed in float64, "
            "which Apple's GPUs do not have. Set trainer.accelerator to cpu"
        )
    if isinstance(strategy, ModelParallelStrategy):
        _check_model_parallel(strategy, world_size)
    elif isinstance(strategy, DDPStrategy):
        if strategy._start_method != "popen":
            raise ValueError(
                f"trainer.strategy starts processes by {strategy._start_method!r}: what they "
                "compute would be lost with them. Set trainer.strategy to ddp, or use torchrun"
            )
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(
            f"trainer.strategy {name} is not supported: set it to auto or ddp, or to FSDP2: "
            f"{fsdp2_lines(world_size)}"
        )
    if world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler must be false: the datamodule shares out the texts "
            "itself, without repeats"
        )


def _check_model_parallel(strategy: ModelParallelStrategy, world_size: int) -> None:
    sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)
    if sizes != (world_size, 1):
        raise ValueError(
            f"ModelParallelStrategy with data_parallel_size {sizes[0]} and tensor_parallel_size "
            f"{sizes[1]} on {world_size} processes is not supported: its default sizes shard "
            "nothing and let the ranks drift apart, and tensor parallel layers have no exact "
            f"Fisher. Set {fsdp2_lines(world_size)}"
        )


def prepare_to_shard(trainer: L.Trainer) -> None:
    """Lets all ranks draw the same numbers, and refuses a checkpoint that would not fit.

    Without it each rank would draw another adapter, and a sharded one would be of parts that do
    not fit together.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        path = Path(trainer.ckpt_path or "")
        if trainer.ckpt_path is not None and path.is_dir():
            check_sharded(path)
        elif trainer.ckpt_path is not None and path.is_file() and trainer.training:
            saved = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            check_resumable(trainer, saved.get("lwf", {}))
        torch.set_rng_state(ranks_of(trainer).from_first(torch.get_rng_state))


def check_resumable(trainer: L.Trainer | None, saved: Mapping[str, Any]) -> None:
    """Refuses to go on under FSDP2 with a run that began without it, or the other way.

    Args:
        trainer: The trainer; None if there is nothing to go on with.
        saved: What LWFModule has put into the checkpoint.

    Raises:
        ValueError: If the states of the optimizers would not fit.
    """
    if trainer is None or not trainer.training or "is_sharded" not in saved:
        return
    if saved["is_sharded"] != isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"{trainer.ckpt_path} was {'' if saved['is_sharded'] else 'not '}saved under FSDP2: go "
            "on with the trainer.strategy it was made with, or make a model of it "
            "(python cli.py export) and begin a run with that"
        )


def shard(model: nn.Module, trainer: L.Trainer) -> None:
    """Cuts the model into shards, in place, if that is the trainer's strategy."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        shard_model(model, trainer.strategy.device_mesh["data_parallel"])


@contextmanager
def gradient_sync(trainer: L.Trainer, sync: bool) -> Iterator[None]:
    """A backward pass whose gradients are averaged over the ranks, or only added up locally.

    The last pass of a step averages what all its passes have added up.
    """
    strategy = trainer.strategy
    if sync or not isinstance(strategy, DDPStrategy):
        yield
    else:
        with strategy.block_backward_sync():
            yield
