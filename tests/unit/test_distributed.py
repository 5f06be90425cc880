"""Which strategies are refused, and that it happens before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lwf_lightning import LWFModule
from lwf_lightning.distributed import check_strategy, fsdp2_lines, ranks_of
from lwf_lightning.ranks import Ranks
from lwf_lightning.trainer import LWFTrainer


def trainer(**options: Any) -> LWFTrainer:
    return LWFTrainer(accelerator="cpu", devices=2, logger=False, **options)


@pytest.mark.parametrize(
    "strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload", FSDPStrategy]
)
def test_fsdp1_and_deepspeed_are_refused_with_the_lines_to_use_instead(
    strategy: str | Callable[[], Any],
) -> None:
    given = strategy if isinstance(strategy, str) else strategy()
    with pytest.raises(ValueError, match=r"trainer.strategy .* is not supported") as caught:
        trainer(strategy=given)
    assert str(caught.value).endswith(fsdp2_lines(2))


def test_the_lines_are_yaml_that_builds_the_strategy() -> None:
    lines = yaml.safe_load(fsdp2_lines(4))["trainer"]["strategy"]
    assert lines["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
    strategy = ModelParallelStrategy(**lines["init_args"])
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"data_parallel_size": 1, "tensor_parallel_size": 2},
        {"data_parallel_size": 1, "tensor_parallel_size": 1},
        {"data_parallel_size": 2},
    ],
)
def test_sizes_that_shard_nothing_or_split_layers_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="data_parallel_size: 2, tensor_parallel_size: 1"):
        trainer(strategy=ModelParallelStrategy(**sizes))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_whose_results_would_be_lost_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=r"Set trainer.strategy to ddp, or use torchrun"):
        trainer(strategy=strategy)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true", DDPStrategy])
def test_ddp_is_taken(strategy: str | Callable[[], Any]) -> None:
    made = trainer(strategy=strategy if isinstance(strategy, str) else strategy())
    check_strategy(made)
    assert isinstance(made.strategy, DDPStrategy)


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = LWFTrainer(accelerator="cpu", devices=1, logger=False)
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("mps"))
    with pytest.raises(ValueError, match=r"trainer.accelerator mps is not supported"):
        check_strategy(made)


def test_a_distributed_sampler_would_share_out_twice() -> None:
    with pytest.raises(ValueError, match=r"trainer.use_distributed_sampler must be false"):
        trainer(strategy="ddp", use_distributed_sampler=True)


def test_another_trainer_is_checked_before_the_model_is_loaded() -> None:
    module = LWFModule("no/such-model")
    module.trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    with pytest.raises(ValueError, match=r"Set trainer.strategy to ddp"):
        module.configure_model()
    assert not hasattr(module, "model")


def test_one_process_sends_nothing() -> None:
    ranks = ranks_of(LWFTrainer(accelerator="cpu", devices=1, logger=False))
    assert ranks == Ranks(0, 1)
    assert ranks.gather("a") == ["a"]
    assert ranks.from_first(lambda: 3) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_disjoint_and_even(world_size: int) -> None:
    shares = [Ranks(rank, world_size).share(range(5)) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
