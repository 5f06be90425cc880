"""Whole fits: what a step does, what is counted, and what stays as plain fine-tuning."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lwf_lightning.callbacks import AscentGuard, ExportCallback, StepCheckpoint
from lwf_lightning.data.batch import collate
from lwf_lightning.data.sampler import batch_indices
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.losses import labelled_tokens, per_text_loss
from lwf_lightning.packing import forward_passes

Make = Callable[..., Any]


def table(trainer: L.Trainer) -> list[dict[str, str]]:
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(trainer: L.Trainer, name: str) -> dict[int, float]:
    """The logged values of a figure by step."""
    return {int(row["step"]): float(row[name]) for row in table(trainer) if row.get(name)}


def test_never_is_plain_fine_tuning_bit_for_bit(
    make_module: Make, make_data: Make, make_trainer: Make, model_folder: Path, make_recorder: Make
) -> None:
    module, data, recorder = make_module(schedule="never"), make_data(), make_recorder()
    make_trainer(callbacks=[recorder]).fit(module, data)

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 8)
    for step in range(8):
        rows = batch_indices(24, 4, 0, step)
        batch = collate([data.learning_encoded[row] for row in rows], 0)
        padded_loss = model(**batch).loss.detach()
        with forward_passes(model, batch) as (row,):
            loss = labelled_tokens(model, row).token_losses()
            (loss.sum() / len(loss)).backward()
        torch.testing.assert_close(loss.mean(), padded_loss)
        norm = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, float(1 / norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch.testing.assert_close(copy_weights(model), recorder.weights[step], rtol=0, atol=0)


def test_fast_dev_run_writes_nothing(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    empty_working_folder: Path,
) -> None:
    fisher, guard = make_callback(), AscentGuard(max_rise=1e-9)
    callbacks = [fisher, guard, StepCheckpoint(every_n_steps=1), ExportCallback()]
    trainer = make_trainer(fast_dev_run=2, default_root_dir="runs", callbacks=callbacks)
    module, data = make_module(schedule="ahead", ahead_steps=2), make_data()
    trainer.fit(module, data)
    trainer.predict(module, data, return_predictions=False)
    assert fisher.scores is not None
    assert guard.state.records
    with pytest.raises(ValueError, match="no Fisher was saved"):
        fisher.load_tensors()
    assert list(empty_working_folder.iterdir()) == []


def test_only_learning_steps_are_counted(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, make_recorder: Make
) -> None:
    module, recorder = make_module(schedule="front_loaded", ahead_steps=4), make_recorder()
    trainer = make_trainer(max_steps=7, callbacks=[make_callback(), recorder])
    trainer.fit(module, make_data())
    assert trainer.global_step == 7
    assert recorder.global_steps == [1, 2, 3, 4, 5, 6, 7]
    assert module.unlearning_steps == 4 + 2  # and before the 4th and the 7th step
    assert sorted(column(trainer, "train/loss")) == [1, 2, 3, 4, 5, 6, 7]
    assert column(trainer, "unlearn/steps") == {0: 4.0, 3: 5.0, 6: 6.0}


@pytest.mark.parametrize("schedule", ["periodic", "random", "ahead"])
def test_unlearning_moves_the_weights_and_leaves_learnings_moments_alone(
    schedule: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    make_recorder: Make,
) -> None:
    plain, mixed = make_recorder(), make_recorder()
    make_trainer(callbacks=[plain]).fit(make_module(schedule="never"), make_data())
    module = make_module(schedule=schedule, ahead_steps=2, unlearning_interval=2)
    trainer = make_trainer(callbacks=[make_callback(), mixed])
    trainer.fit(module, make_data())
    assert module.unlearning_steps > 0
    first = next(iter(column(trainer, "unlearn/steps")))
    for step, (a, b) in enumerate(zip(plain.weights, mixed.weights, strict=True)):
        same = all(torch.equal(a[name], b[name]) for name in a)
        assert same == (step < first), step
    learning, unlearning = trainer.optimizers
    for optimizer, steps in ((learning, 8), (unlearning, module.unlearning_steps)):
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_ascent_raises_the_loss_of_the_forget_set_and_replay_lowers_it(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    def change(objective: str) -> float:
        module, data = (
            make_module(schedule="ahead", ahead_steps=6, objective=objective),
            make_data(),
        )
        trainer = make_trainer(max_steps=1, callbacks=[make_callback()])
        trainer.fit(module, data)
        nll = column(trainer, "unlearn/nll")
        texts = [data.self_knowledge.texts[index].encoded() for index in data.forget_set]
        with torch.no_grad():
            after = per_text_loss(module.model, collate(texts, 0)).mean()
            for name, parameter in module.model.named_parameters():
                parameter.copy_(module.base_weights[name])
            before = per_text_loss(module.model, collate(texts, 0)).mean()
        assert len(nll) == 1
        return float(after - before)

    assert change("gradient_ascent") > 0.1
    assert change("npo") > 0.1
    assert change("replay") < -0.1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_unlearning_step_follows_forget_and_retained_texts(
    weight: float,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make_module(
        schedule="ahead",
        ahead_steps=1,
        unlearning_retain=weight,
        unlearning_max_grad_norm=1e9,
        unlearning_ceiling=1e9,
    )
    found: dict[str, Tensor] = {}

    def record(*_: Any) -> None:
        named = module.model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    monkeypatch.setattr(module, "_ascend", record)
    data = make_data()
    trainer = make_trainer(max_steps=1, callbacks=[make_callback()])
    trainer.fit(module, data)
    with torch.no_grad():  # the learning step has moved them
        for name, parameter in module.model.named_parameters():
            parameter.copy_(module.base_weights[name])
    loss = -per_text_loss(module.model, data.forget_batch(0)).mean()
    retained = per_text_loss(module.model, data.retain_batch(0)).mean()
    module.model.zero_grad()
    (loss + weight * retained).backward()
    expected = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    logged = column(trainer, "unlearn/retained_nll") if weight else {}
    assert list(logged.values()) == ([pytest.approx(float(retained), rel=1e-4)] if weight else [])


def test_the_ceiling_stops_the_ascent(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, make_recorder: Make
) -> None:
    module = make_module(schedule="ahead", ahead_steps=5, unlearning_ceiling=1e-6)
    recorder = make_recorder()
    trainer = make_trainer(callbacks=[make_callback(), recorder])
    trainer.fit(module, make_data())
    assert set(column(trainer, "unlearn/texts_pushed").values()) == {0.0}
    plain = make_recorder()
    make_trainer(callbacks=[plain]).fit(make_module(schedule="never"), make_data())
    torch.testing.assert_close(recorder.weights, plain.weights, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 20])
def test_passes_add_up_to_the_same_step(
    tokens: int, make_module: Make, make_data: Make, make_trainer: Make, make_recorder: Make
) -> None:
    whole, cut = make_recorder(), make_recorder()
    make_trainer(callbacks=[whole]).fit(make_module(schedule="never"), make_data())
    module = make_module(schedule="never", tokens_per_pass=tokens)
    make_trainer(callbacks=[cut]).fit(module, make_data())
    # one AdamW step from zero moments has the sign of the gradient: rounding shows there most
    torch.testing.assert_close(cut.weights[-1], whole.weights[-1], rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(
    make_module: Make, make_data: Make, make_trainer: Make, make_recorder: Make
) -> None:
    off, on = make_recorder(), make_recorder()
    make_trainer(callbacks=[off]).fit(make_module(schedule="never"), make_data())
    module = make_module(schedule="never", gradient_checkpointing=True)
    make_trainer(callbacks=[on]).fit(module, make_data())
    torch.testing.assert_close(on.weights[-1], off.weights[-1], rtol=1e-4, atol=1e-5)


def test_lora_trains_the_adapter_and_unlearns_through_it(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    from peft import LoraConfig

    module = make_module(
        lora=LoraConfig(r=2, target_modules=["q_proj"]), gradient_checkpointing=True
    )
    trainer = make_trainer(callbacks=[make_callback()])
    trainer.fit(module, make_data())
    assert module.unlearning_steps == 2
    assert module.base_weights is not None
    names = set(module.base_weights)
    assert names
    assert all("lora_" in name for name in names)
    moved = copy_weights(module.model)
    assert any(not torch.equal(moved[name], module.base_weights[name]) for name in names)


def test_a_limit_cuts_no_epoch_short(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(max_steps=-1, max_epochs=4, limit_train_batches=4)
    trainer.fit(make_module(schedule="never"), make_data())
    assert trainer.global_step == 16


class Stream(IterableDataset[Any]):
    """Texts one by one, of which nobody knows how many there are."""

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[Any]:
        return iter(self.texts)


@pytest.mark.parametrize("epochs", [-1, 1])
def test_a_run_of_unknown_length_is_refused(
    make_module: Make, make_data: Make, make_trainer: Make, epochs: int
) -> None:
    """Its learning rate would follow a cosine of -1 steps."""
    loader = DataLoader(Stream([]), batch_size=None)
    trainer = make_trainer(max_steps=-1, max_epochs=epochs)
    with pytest.raises(ValueError, match="is not known: set trainer"):
        trainer.fit(make_module(schedule="never"), loader)


def test_without_a_scorer_the_run_refuses_or_unlearns_everything(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    with pytest.raises(ValueError, match="nothing chooses what to forget: add lwf_lightning"):
        make_trainer().fit(make_module(), make_data())
    module, data = make_module(without_scores="use_all"), make_data()
    make_trainer().fit(module, data)
    assert module.unlearning_steps == 2
    assert len(data.forget_set) == len(data.self_knowledge.texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlearning_interval": 0}, "unlearning_interval must be at least 1, got 0"),
        ({"unlearning_interval": -2}, "unlearning_interval must be at least 1, got -2"),
        ({"learning_rate": 0.0}, "model.init_args.learning_rate must be above 0"),
        ({"unlearning_scale": -1.0}, "model.init_args.unlearning_scale must be above 0"),
        ({"warmup_ratio": 1.5}, r"model.init_args.warmup_ratio must lie in \[0, 1\]"),
        ({"tokens_per_pass": 0}, "model.init_args.tokens_per_pass must be at least 1"),
        ({"dtype": "float16"}, "unknown model.init_args.dtype 'float16'; choose one of float32"),
        ({"learning_rate_schedule": "step"}, "unknown model.init_args.learning_rate_schedule"),
        ({"without_scores": "ignore"}, "unknown model.init_args.without_scores 'ignore'"),
        ({"objective": "bogus"}, "unknown objective 'bogus'"),
        ({"schedule": "bogus"}, "unknown schedule 'bogus'"),
    ],
)
def test_bad_values_are_refused_at_once(
    options: dict[str, Any], message: str, make_module: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def test_hyperparameters_load_as_primitives(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    from peft import LoraConfig

    from lwf_lightning import LWFModule

    module = make_module(
        schedule="never", lora=LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = LWFModule.load_from_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(copy_weights(loaded.model), copy_weights(module.model))
    assert loaded.hparams["learning_rate"] == 1e-2
    with pytest.raises(ValueError, match=r"was not made by LWFModule"):
        module.on_load_checkpoint({"state_dict": {}})
