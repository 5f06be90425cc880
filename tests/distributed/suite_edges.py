"""Cases in which ranks could part ways. Run through torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, distributed

from lwf_lightning.callbacks.checkpoint import StepCheckpoint
from lwf_lightning.forgetting.weights import copy_weights

pytestmark = pytest.mark.skipif("RANK" not in os.environ, reason="run with torchrun")
Make = Callable[..., Any]
RANK = int(os.environ.get("RANK", "0"))


def of_all_ranks(value: Any) -> list[Any]:
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def assert_same_on_all_ranks(value: Any) -> None:
    for other in of_all_ranks(value):
        torch.testing.assert_close(value, other, rtol=0, atol=0)


class Poison(L.Callback):
    """Makes the gradient of one rank NaN in one batch."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.hook = None
        if (self.rank, self.batch) == (RANK, index):
            parameter = next(pl_module.model.parameters())
            self.hook = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


def test_a_learning_step_that_is_not_finite_on_one_rank_is_skipped_on_all(make_run: Make) -> None:
    trainer, module, data, _ = make_run("probe", 2, [Poison(rank=1, batch=1)], max_steps=3)
    trainer.fit(module, data)
    assert of_all_ranks((trainer.global_step, module.skipped_steps)) == [(3, 1)] * 2
    assert_same_on_all_ranks(copy_weights(module.model))
    assert all(bool(torch.isfinite(p).all()) for p in module.model.parameters())


def test_an_unlearning_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(
    make_run: Make,
) -> None:
    trainer, module, data, _ = make_run("probe", 2, max_steps=7)  # unlearns before steps 4 and 7
    objective, calls = module.objective, []

    def poisoned(tokens: Any, reference: Any) -> Tensor:
        calls.append(objective(tokens, reference))
        return calls[-1] * (float("nan") if RANK == 1 and len(calls) == 1 else 1.0)

    poisoned.ascends, poisoned.needs_reference = True, False
    module.objective = poisoned
    trainer.fit(module, data)
    assert len(calls) == 2
    assert of_all_ranks((module.unlearning_steps, module.skipped_steps)) == [(2, 1)] * 2
    assert_same_on_all_ranks(copy_weights(module.model))


def test_gradients_meet_in_the_last_pass_of_a_step_and_not_before(make_run: Make) -> None:
    trainer, module, data, _ = make_run("probe", 2, max_steps=2)
    equal: list[bool] = []

    def on_after_backward() -> None:
        gradients = of_all_ranks([p.grad for p in module.model.parameters()])
        equal.append(all(map(torch.equal, *gradients)))

    module.on_after_backward = on_after_backward
    trainer.fit(module, data)
    assert equal == [False, True] * 2


def test_an_adapter_starts_alike_everywhere_and_a_resumed_run_equals_a_whole_one(
    make_run: Make, make_module: Make, shared_folder: Path
) -> None:
    from peft import LoraConfig

    def run(seed: int, steps: int, callbacks: Any = (), **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(seed + RANK)  # adapter and dropout would differ from rank to rank
        checkpoint = options.pop("ckpt_path", None)
        trainer, _, data, callback = make_run("probe", 2, callbacks, max_steps=steps, **options)
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.4)
        module = make_module(lora=lora)
        trainer.fit(module, data, ckpt_path=checkpoint)
        assert_same_on_all_ranks([copy_weights(module.model), module.base_weights])
        assert_same_on_all_ranks(callback.state_dict()["scores"])
        return copy_weights(module.model), trainer

    root = shared_folder / "resumed"
    whole, trainer = run(1, 8, [StepCheckpoint(every_n_steps=4)], default_root_dir=root)
    kept = Path(trainer.log_dir) / "checkpoints"
    rest, trainer = run(5, 8, ckpt_path=str(kept / "step-000004.ckpt"))
    assert trainer.global_step == 8
    torch.testing.assert_close(rest, whole, rtol=0, atol=0)


def test_elicited_texts_that_only_the_first_rank_has_kept_serve_all(
    make_run: Make, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, module, data, _ = make_run("probe", 2, max_steps=1)
    trainer.fit(module, data)
    cached = of_all_ranks([path.name for path in Path(data.cache_dir).glob("*")])
    assert len(cached[0]) == 1
    assert cached[1] == []  # every rank of this test has a folder of its own

    def generate(*_: Any, **__: Any) -> Any:
        raise AssertionError("generated again")

    # not by its name, which is that of a function in the package
    module_of_elicit = sys.modules["lwf_lightning.forgetting.elicit"]
    monkeypatch.setattr(module_of_elicit, "generate_answers", generate)
    again = make_data()
    again.trainer, again.tokenizer = trainer, data.tokenizer
    again.setup("fit")
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            parameter.copy_(module.base_weights[name])
    again.elicit_self_knowledge(module.model)
    assert again.self_knowledge == data.self_knowledge


def test_a_checkpoint_of_one_process_is_gone_on_with(
    weights_after: Make, shared_folder: Path
) -> None:
    expected = torch.load(shared_folder / "weights.pt", weights_only=True)
    kept = shared_folder / "checkpoints"
    found = weights_after(2, kept / "of two", kept / "of one" / "step=5.ckpt")
    torch.testing.assert_close(found, expected[5:], rtol=1e-12, atol=1e-12)


def test_one_run_folder_is_written_and_it_is_whole(make_run: Make, shared_folder: Path) -> None:
    root = shared_folder / "one_folder"
    trainer, module, data, callback = make_run("probe", 2, max_steps=2, default_root_dir=root)
    trainer.fit(module, data)
    trainer.predict(module, data, return_predictions=False)
    distributed.barrier()
    (run,) = root.iterdir()
    assert of_all_ranks(callback.tensors_file) == [str(run / "fisher/step-000000.safetensors")] * 2
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.")}
    assert len({name.split(".")[-2] for name in events}) == 1  # written by one process
    assert files - events == {
        ".lock",
        "checkpoints/step-000002.ckpt",
        "fisher/step-000000.safetensors",
        "hparams.yaml",
        "metrics.csv",
        "predictions.jsonl",
        "run.json",
        "scores/step-000000.jsonl",
    }
