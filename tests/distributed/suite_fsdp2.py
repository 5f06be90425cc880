"""Whole runs with weights in shards. Run through torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM

from lwf_lightning.callbacks.export import ExportCallback
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.shards import local, whole

pytestmark = pytest.mark.skipif("RANK" not in os.environ, reason="run with torchrun")
Make = Callable[..., Any]
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


@pytest.fixture
def strategy() -> str:
    return "fsdp2"


def state_of(trainer: Any) -> list[dict[str, Tensor]]:
    """Weights and moments of both optimizers, put together."""
    weights = copy_weights(trainer.lightning_module.model)
    state: list[dict[str, Tensor]] = [{name: whole(tensor) for name, tensor in weights.items()}]
    for optimizer in trainer.strategy.optimizers:
        for moments in optimizer.state.values():
            state.append({name: whole(tensor).cpu() for name, tensor in moments.items()})
    return state


@pytest.mark.parametrize(("distributed_checkpoint", "lora"), [(False, True), (True, False)])
def test_a_resumed_run_equals_one_that_saved_nothing_and_both_formats_are_exported(
    make_run: Make,
    make_module: Make,
    shared_folder: Path,
    distributed_checkpoint: bool,
    lora: bool,
) -> None:
    from peft import LoraConfig

    kept = shared_folder / f"{distributed_checkpoint}-{lora}"

    def run(callbacks: Any = (), **options: Any) -> Any:
        torch.manual_seed(3 + RANK)  # an adapter would start otherwise on every rank
        adapter = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.2) if lora else None
        trainer, _, data, _ = make_run("probe", WORLD_SIZE, callbacks, max_steps=6)
        trainer.strategy._save_distributed_checkpoint = distributed_checkpoint
        # Unlearns before steps 4 and 6: the checkpoint finds that optimizer without a step.
        module = make_module(lora=adapter, unlearning_interval=3, learning_rate=1e-2)
        trainer.fit(module, data, **options)
        return trainer

    expected = run()
    saver = ModelCheckpoint(dirpath=kept, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    saving = run([saver, ExportCallback(str(kept / "exported"), merge=False)])
    checkpoint = kept / "step=2.ckpt"
    assert checkpoint.is_dir() == distributed_checkpoint
    resumed = run(ckpt_path=str(checkpoint))
    torch.testing.assert_close(state_of(saving), state_of(expected), rtol=0, atol=0)
    torch.testing.assert_close(state_of(resumed), state_of(expected), rtol=0, atol=0)
    module = resumed.lightning_module
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            base = local(module.base_weights[name])
            assert base.shape == parameter.to_local().shape
            assert base.untyped_storage().nbytes() <= 2 * 4 * base.numel()
    for name, tensor in expected.lightning_module.base_weights.items():
        torch.testing.assert_close(whole(module.base_weights[name]), whole(tensor), rtol=0, atol=0)

    final = {name: whole(tensor) for name, tensor in copy_weights(module.model).items()}
    if RANK == 0:
        expected.export(module, ckpt_path=str(kept / "step=6.ckpt"), output=str(kept / "model"))
        if not lora:
            for folder in ("exported", "model"):
                model = AutoModelForCausalLM.from_pretrained(kept / folder, dtype=torch.float32)
                torch.testing.assert_close(copy_weights(model), final, rtol=0, atol=0)
        else:
            assert (kept / "exported" / "adapter").is_dir()
            assert (kept / "model" / "merged" / "config.json").is_file()
    distributed.barrier()


def test_a_checkpoint_that_was_not_saved_under_fsdp2_is_refused(
    weights_after: Make, shared_folder: Path
) -> None:
    file = shared_folder / "checkpoints" / "of one" / "step=5.ckpt"
    with pytest.raises(ValueError, match=r"step=5\.ckpt was not saved under FSDP2: go on with"):
        weights_after(WORLD_SIZE, shared_folder / "checkpoints" / "of two", file)


def test_a_run_with_other_self_knowledge_is_not_gone_on_with(
    make_run: Make, shared_folder: Path
) -> None:
    saver = ModelCheckpoint(
        dirpath=shared_folder / "other", every_n_train_steps=1, filename="{step}"
    )
    trainer, module, data, _ = make_run("probe", WORLD_SIZE, [saver], max_steps=1)
    trainer.fit(module, data)
    trainer, module, data, _ = make_run("probe", WORLD_SIZE, max_steps=2)
    data.max_new_tokens = 2
    with pytest.raises(ValueError, match="the self-knowledge is not that of the checkpoint"):
        trainer.fit(module, data, ckpt_path=shared_folder / "other" / "step=1.ckpt")


def test_bf16_mixed_is_near_float32(make_run: Make) -> None:
    fits = []
    for precision in ("32-true", "bf16-mixed"):
        trainer, module, data, callback = make_run("probe", WORLD_SIZE, precision=precision)
        trainer.fit(module, data)
        weights = {name: whole(tensor) for name, tensor in copy_weights(module.model).items()}
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        fits.append((callback.load_tensors()[0], weights, module.unlearning_steps))
    (fisher, weights, steps), (near_fisher, near_weights, near_steps) = fits
    assert steps == near_steps > 0
    for name, tensor in fisher.items():
        assert (near_fisher[name] - tensor).norm() < 0.1 * tensor.norm(), name
        assert not torch.equal(near_fisher[name], tensor)
        # At most the sign of a step is another: 13 of 5e-4, and those of unlearning.
        assert (near_weights[name] - weights[name]).norm() < 0.1 * weights[name].norm(), name
