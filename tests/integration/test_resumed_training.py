"""A fit that goes on from a checkpoint, and one that starts anew with used objects."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from lwf_lightning.forgetting.weights import copy_weights, exchanged_weights

Make = Callable[..., Any]


@pytest.mark.parametrize("anchor", ["probe", "online"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    anchor: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    make_recorder: Make,
) -> None:
    interval = 3 if anchor == "online" else None

    def callback() -> Any:
        return make_callback(anchor=anchor, refresh_interval=interval)

    whole = make_recorder()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    first = callback()
    make_trainer(max_steps=10, callbacks=[first, whole, saver]).fit(make_module(), make_data())
    file = str(next((tmp_path / "kept").glob("*step=5.ckpt")))
    rest, second = make_recorder(), callback()
    module = make_module()
    trainer = make_trainer(max_steps=10, callbacks=[second, rest])
    trainer.fit(module, make_data(), ckpt_path=file)
    assert rest.global_steps == [6, 7, 8, 9, 10]
    torch.testing.assert_close(rest.weights, whole.weights[5:], rtol=0, atol=0)
    torch.testing.assert_close(second.scores.confidence, first.scores.confidence, rtol=0, atol=0)
    assert second.forget_set == first.forget_set
    assert second.refreshed_at == first.refreshed_at


class Rates(L.Callback):
    """Keeps the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_run_that_goes_on_from_a_file_follows_its_own_arguments(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    unlearning = {"unlearning_interval": 1, "without_scores": "use_all"}
    first = make_trainer(max_steps=3)
    first.fit(make_module(**unlearning), make_data())
    first.save_checkpoint(tmp_path / "three.ckpt")
    module = make_module(
        **unlearning,
        learning_rate=1e-5,
        learning_rate_schedule="linear",
        warmup_ratio=0.0,
        weight_decay=0.2,
        betas=(0.7, 0.8),
    )
    seen = Rates()
    trainer = make_trainer(max_steps=6, callbacks=[seen])
    trainer.fit(module, make_data(), ckpt_path=str(tmp_path / "three.ckpt"))
    assert seen.rates == [pytest.approx(1e-5 * share) for share in (3 / 6, 2 / 6, 1 / 6)]
    for optimizer, decay, steps in zip(trainer.optimizers, (0.2, 0.0), (6, 5), strict=True):
        matrices, vectors = optimizer.param_groups
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (decay, 0.0)
        assert matrices["betas"] == vectors["betas"] == (0.7, 0.8)
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_a_resumed_adapter_keeps_its_start_and_its_dropout(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    make_recorder: Make,
) -> None:
    def pieces() -> tuple[Any, Any, Any]:
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.4)
        callback = make_callback(anchor="online", refresh_interval=3)
        return make_module(lora=lora), callback, make_recorder()

    torch.manual_seed(1)
    module, first, whole = pieces()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    make_trainer(max_steps=8, callbacks=[first, whole, saver]).fit(module, make_data())
    torch.manual_seed(2)  # the adapter would start elsewhere
    module, second, rest = pieces()
    file = str(next((tmp_path / "kept").glob("*step=5.ckpt")))
    make_trainer(max_steps=8, callbacks=[second, rest]).fit(module, make_data(), ckpt_path=file)
    torch.testing.assert_close(rest.weights, whole.weights[5:], rtol=0, atol=0)
    torch.testing.assert_close(second.scores.confidence, first.scores.confidence, rtol=0, atol=0)


def test_an_adapter_trained_without_unlearning_can_go_on_with_it(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, tmp_path: Path
) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    plain = make_module(schedule="never", lora=LoraConfig(**lora))
    first = make_trainer(max_steps=2)
    first.fit(plain, make_data())
    first.save_checkpoint(tmp_path / "two.ckpt")
    module = make_module(unlearning_interval=1, lora=LoraConfig(**lora))
    trainer = make_trainer(max_steps=4, callbacks=[make_callback()])
    trainer.fit(module, make_data(), ckpt_path=str(tmp_path / "two.ckpt"))
    assert module.unlearning_steps == 2
    # The adapter was drawn anew: the run looks back at where the one that is trained started.
    torch.testing.assert_close(module.base_weights, plain.base_weights, rtol=0, atol=0)


def test_a_second_fit_of_the_same_objects_starts_anew(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, make_recorder: Make
) -> None:
    data, callback = make_data(), make_callback(anchor="online", refresh_interval=3)
    runs = []
    for _ in range(2):
        module, recorder = make_module(unlearning_interval=2), make_recorder()
        make_trainer(callbacks=[callback, recorder]).fit(module, data)
        assert callback.refreshed_at == 6
        assert module.unlearning_steps == 2  # before steps 5 and 7, not before 3
        runs.append(recorder.weights)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="nothing chooses what to forget"):
        make_trainer().fit(make_module(), data)


@pytest.mark.parametrize("way", ["fitted", "fitted with LoRA", "tested", "loaded"])
def test_a_fit_looks_back_at_the_weights_that_the_module_held_when_it_began(
    way: str, make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"]) if "LoRA" in way else None
    options = {"unlearning_interval": 1, "without_scores": "use_all", "lora": lora}
    module, file = make_module(**options), tmp_path / "two.ckpt"
    first = make_trainer(max_steps=2)
    first.fit(module, make_data())
    first.save_checkpoint(file)
    if way == "tested":
        module = make_module(**options)
        make_trainer().test(module, make_data(), ckpt_path=str(file))
    elif way == "loaded":
        module = type(module).load_from_checkpoint(file)
    before, data = copy_weights(module.model), make_data()
    make_trainer(max_steps=2).fit(module, data)
    torch.testing.assert_close(module.base_weights, before, rtol=0, atol=0)
    with exchanged_weights(module.model, before):
        asked = [example.prompt for _, example in data.forgetting_examples]
        assert data.answers_of(module.model, {"forget": asked}) == data.self_knowledge


def test_a_fit_that_goes_on_with_used_objects_looks_back_at_where_its_run_began(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    module = make_module(unlearning_interval=1, without_scores="use_all")
    first = make_trainer(max_steps=2)
    first.fit(module, make_data())
    first.save_checkpoint(tmp_path / "two.ckpt")
    began_at = {name: weight.clone() for name, weight in module.base_weights.items()}
    make_trainer(max_steps=3).fit(module, make_data(), ckpt_path=str(tmp_path / "two.ckpt"))
    torch.testing.assert_close(module.base_weights, began_at, rtol=0, atol=0)


def test_resuming_with_other_self_knowledge_is_refused(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=2, callbacks=[make_callback()])
    trainer.fit(make_module(), make_data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="the self-knowledge is not that of the checkpoint"):
        make_trainer(callbacks=[make_callback()]).fit(
            make_module(), make_data(forgetting_prompts=5), ckpt_path=str(tmp_path / "two.ckpt")
        )


def test_resuming_with_other_learning_texts_is_refused_and_testing_is_not(
    make_module: Make, make_data: Make, make_trainer: Make, data_folder: Path, tmp_path: Path
) -> None:
    trainer, file = make_trainer(max_steps=2), tmp_path / "two.ckpt"
    trainer.fit(make_module(schedule="never"), make_data())
    trainer.save_checkpoint(file)
    other = tmp_path / "other"
    shutil.copytree(data_folder, other)
    rows = other / "learn" / "train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[::-1]))
    module, data = make_module(schedule="never"), make_data(data_dir=str(other))
    make_trainer().test(module, data, ckpt_path=str(file))
    with pytest.raises(ValueError, match="the learning texts are not those of the checkpoint"):
        make_trainer().fit(module, data, ckpt_path=str(file))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_what_a_checkpoint_keeps_of_its_run_is_left_alone_where_nothing_is_trained(
    stage: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def fit(**options: Any) -> tuple[Any, ...]:
        callback, module, data = make_callback(), make_module(), make_data(**options)
        trainer = make_trainer(max_steps=2, callbacks=[callback], limit_val_batches=1)
        trainer.fit(module, data)
        return trainer, module, data, callback

    other, *_, scored = fit(forgetting_prompts=5, seed=1)
    other.save_checkpoint(tmp_path / "other.ckpt")
    Path(scored.tensors_file).unlink()
    trainer, module, data, callback = fit()
    kept = data.forget_set, callback.forget_set, callback.scores, callback.tensors_file
    recwarn.clear()
    getattr(trainer, stage)(module, data, ckpt_path=str(tmp_path / "other.ckpt"))
    assert (data.forget_set, callback.forget_set, callback.scores, callback.tensors_file) == kept
    said = [str(warning.message) for warning in recwarn]
    assert not [text for text in said if "is gone" in text or "data.init_args.seed" in text]
