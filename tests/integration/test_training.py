"""Whole fits: what a step does, what is counted, and what stays as plain fine-tuning."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lwf_lightning.data.batch import collate
from lwf_lightning.data.sampler import batch_indices
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.losses import labelled_tokens, per_text_loss

Make = Callable[..., Any]


def table(trainer: L.Trainer) -> list[dict[str, str]]:
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(trainer: L.Trainer, name: str) -> dict[int, float]:
    """The logged values of a figure by step."""
    return {int(row["step"]): float(row[name]) for row in table(trainer) if row.get(name)}


class Recorder(L.Callback):
    """Keeps the weights after each learning step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.global_steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append(copy_weights(pl_module.model))
        self.global_steps.append(trainer.global_step)


def test_never_is_plain_fine_tuning_bit_for_bit(
    make_module: Make, make_data: Make, make_trainer: Make, model_folder: Path
) -> None:
    module, data, recorder = make_module(schedule="never"), make_data(), Recorder()
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
        loss = labelled_tokens(model, batch).token_losses()
        (loss.sum() / len(loss)).backward()
        norm = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, float(1 / norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        torch.testing.assert_close(copy_weights(model), recorder.weights[step], rtol=0, atol=0)


def test_only_learning_steps_are_counted(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    module, recorder = make_module(schedule="front_loaded", ahead_steps=4), Recorder()
    trainer = make_trainer(max_steps=7, callbacks=[make_callback(), recorder])
    trainer.fit(module, make_data())
    assert trainer.global_step == 7
    assert recorder.global_steps == [1, 2, 3, 4, 5, 6, 7]
    assert module.unlearning_steps == 4 + 2  # and before the 4th and the 7th step
    assert sorted(column(trainer, "train/loss")) == [1, 2, 3, 4, 5, 6, 7]
    assert column(trainer, "unlearn/steps") == {0: 4.0, 3: 5.0, 6: 6.0}


@pytest.mark.parametrize("schedule", ["periodic", "random", "ahead"])
def test_unlearning_moves_the_weights_and_leaves_learnings_moments_alone(
    schedule: str, make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    plain, mixed = Recorder(), Recorder()
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


def test_the_ceiling_stops_the_ascent(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    module = make_module(schedule="ahead", ahead_steps=5, unlearning_ceiling=1e-6)
    recorder = Recorder()
    trainer = make_trainer(callbacks=[make_callback(), recorder])
    trainer.fit(module, make_data())
    assert set(column(trainer, "unlearn/texts_pushed").values()) == {0.0}
    plain = Recorder()
    make_trainer(callbacks=[plain]).fit(make_module(schedule="never"), make_data())
    torch.testing.assert_close(recorder.weights, plain.weights, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 20])
def test_passes_add_up_to_the_same_step(
    tokens: int, make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    whole, cut = Recorder(), Recorder()
    make_trainer(callbacks=[whole]).fit(make_module(schedule="never"), make_data())
    module = make_module(schedule="never", tokens_per_pass=tokens)
    make_trainer(callbacks=[cut]).fit(module, make_data())
    # one AdamW step from zero moments has the sign of the gradient: rounding shows there most
    torch.testing.assert_close(cut.weights[-1], whole.weights[-1], rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    off, on = Recorder(), Recorder()
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


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains_and_unlearns(
    precision: Any, make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    module = make_module()
    validated = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = make_trainer(precision=precision, callbacks=[make_callback()], **validated)
    trainer.fit(module, make_data())
    assert module.unlearning_steps == 2
    assert all(torch.isfinite(p).all() for p in module.model.parameters())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_under_autocast_every_step_sees_the_weights_of_the_step_before(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    # all steps of one training_step share an autocast context, which caches casts of the weights
    seen: list[float] = []
    module = make_module(schedule="ahead", ahead_steps=4, unlearning_scale=1.0)
    module._log_unlearning = lambda figures: seen.append(float(figures["unlearn/nll"]))
    data = make_data(forget_batch_size=100)  # each step unlearns the same texts
    callback = make_callback(probe_steps=8)
    trainer = make_trainer(precision="bf16-mixed", max_steps=1, callbacks=[callback])
    trainer.fit(module, data)
    assert len(set(seen)) == 4
    assert seen[-1] > seen[0]

    exact = make_callback(probe_steps=8)
    make_trainer(max_steps=1, callbacks=[exact]).fit(make_module(), make_data())
    anchor, expected = callback.load_tensors()[1], exact.load_tensors()[1]
    assert module.base_weights is not None
    for name, start in module.base_weights.items():
        moved, should = anchor[name] - start, expected[name] - start
        assert torch.nn.functional.cosine_similarity(moved.flatten(), should.flatten(), dim=0) > 0.9


class Poison(L.Callback):
    """Makes the gradient of some steps NaN."""

    def __init__(self, batches: set[int]) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.hook = None
        if index in self.batches:
            parameter = next(pl_module.model.parameters())
            self.hook = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


def test_scores_are_float32_in_bf16(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    callback = make_callback()
    make_trainer(precision="bf16-true", callbacks=[callback]).fit(make_module(), make_data())
    assert callback.scores.alignment.dtype == torch.float32
    assert callback.scores.sensitivity.dtype == torch.float32


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    module, recorder = make_module(schedule="never"), Recorder()
    trainer = make_trainer(max_steps=4, callbacks=[Poison({1, 2}), recorder])
    trainer.fit(module, make_data())
    assert module.skipped_steps == 2
    assert trainer.global_step == 4
    assert recorder.global_steps == [1, 1, 1, 2, 3, 4]
    torch.testing.assert_close(recorder.weights[0], recorder.weights[2], rtol=0, atol=0)
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unlearning_loss_that_is_not_finite_is_skipped_and_counted(
    value: float, make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    module, plain = make_module(schedule="ahead", ahead_steps=3), Recorder()
    module.objective = lambda tokens, reference: tokens.per_text(tokens.token_losses() * value)
    module.objective.ascends, module.objective.needs_reference = True, False
    recorder = Recorder()
    make_trainer(callbacks=[make_callback(), recorder]).fit(module, make_data())
    assert module.skipped_steps == 3
    make_trainer(callbacks=[plain]).fit(make_module(schedule="never"), make_data())
    torch.testing.assert_close(recorder.weights, plain.weights, rtol=0, atol=0)


def test_too_many_skipped_steps_stop_the_run_and_leave_its_checkpoint(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    module = make_module(schedule="never", max_skipped_steps=1)
    trainer = make_trainer(callbacks=[Poison({2, 3}), saver])
    with pytest.raises(NonFiniteLossError, match="2 steps had a NaN or infinite loss or grad"):
        trainer.fit(module, make_data())
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(kept) == 2
    resumed = make_trainer(max_steps=3)
    resumed.fit(make_module(schedule="never"), make_data(), ckpt_path=str(kept[-1]))
    assert resumed.global_step == 3


@pytest.mark.parametrize("anchor", ["probe", "online"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    anchor: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    interval = 3 if anchor == "online" else None

    def callback() -> Any:
        return make_callback(anchor=anchor, refresh_interval=interval)

    whole = Recorder()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    first = callback()
    make_trainer(max_steps=10, callbacks=[first, whole, saver]).fit(make_module(), make_data())
    file = str(next((tmp_path / "kept").glob("*step=5.ckpt")))
    rest, second = Recorder(), callback()
    module = make_module()
    trainer = make_trainer(max_steps=10, callbacks=[second, rest])
    trainer.fit(module, make_data(), ckpt_path=file)
    assert rest.global_steps == [6, 7, 8, 9, 10]
    torch.testing.assert_close(rest.weights, whole.weights[5:], rtol=0, atol=0)
    torch.testing.assert_close(second.scores.confidence, first.scores.confidence, rtol=0, atol=0)
    assert second.forget_set == first.forget_set
    assert second.refreshed_at == first.refreshed_at


def test_a_resumed_adapter_keeps_its_start_and_its_dropout(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from peft import LoraConfig

    def pieces() -> tuple[Any, Any, Recorder]:
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.4)
        callback = make_callback(anchor="online", refresh_interval=3)
        return make_module(lora=lora), callback, Recorder()

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


def test_a_second_fit_of_the_same_objects_starts_anew(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    data, callback = make_data(), make_callback(anchor="online", refresh_interval=3)
    runs = []
    for _ in range(2):
        module, recorder = make_module(unlearning_interval=2), Recorder()
        make_trainer(callbacks=[callback, recorder]).fit(module, data)
        assert callback.refreshed_at == 6
        assert module.unlearning_steps == 2  # before steps 5 and 7, not before 3
        runs.append(recorder.weights)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="nothing chooses what to forget"):
        make_trainer().fit(make_module(), data)


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


def test_a_limit_cuts_no_epoch_short(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(max_steps=-1, max_epochs=4, limit_train_batches=4)
    trainer.fit(make_module(schedule="never"), make_data())
    assert trainer.global_step == 16


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
