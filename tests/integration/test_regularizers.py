"""Whole fits with a structural baseline: equal to a plain loop, resumable, beside unlearning."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from lwf_lightning import LWFModule
from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.data.sampler import batch_indices
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.losses import per_text_loss

Make = Callable[..., Any]
STRENGTH = {"bss": 0.5, "l2sp": 3.0, "ewc": 2000.0}


@pytest.fixture
def regularized(make_module: Make) -> Make:
    def make(name: str, **options: Any) -> Any:
        return make_module(
            regularizer=name, regularizer_options={"strength": STRENGTH[name]}, **options
        )

    return make


def penalties(trainer: L.Trainer) -> list[float]:
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row["train/regularizer"]) for row in rows if row.get("train/regularizer")]


def last_states(model: Any, texts: list[EncodedText]) -> Iterator[Tensor]:
    for text in texts:
        ids = torch.tensor([text.input_ids])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        yield states[0, next(i for i, label in enumerate(text.labels) if label != -100) - 1]


def squared_gradients(model: Any, texts: list[EncodedText]) -> list[Tensor]:
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for text in texts:
        loss = per_text_loss(model, collate([text], 0)).sum()
        for total, gradient in zip(
            sums, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total += gradient.square() / len(texts)
    return sums


def plain_loop(
    folder: Path, data: Any, name: str, steps: int
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Fine-tuning with the penalty written out and differentiated by autograd."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    base = [p.detach().clone() for p in model.parameters()]
    importance = [torch.ones_like(p) for p in base]
    if name == "ewc":
        known = [text.encoded() for text in data.self_knowledge.texts]
        importance = squared_gradients(model, known)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    weights, values = [], []
    for step in range(steps):
        texts = [data.learning_encoded[row] for row in batch_indices(24, 4, 0, step)]
        losses = [per_text_loss(model, collate([t], 0), reduction="sum").sum() for t in texts]
        loss = sum(losses) / sum(label != -100 for t in texts for label in t.labels)
        if name == "bss":
            smallest = torch.linalg.svdvals(torch.stack(list(last_states(model, texts))))[-1]
            penalty = STRENGTH[name] * smallest.square()
        else:
            moved = zip(model.parameters(), base, importance, strict=True)
            penalty = STRENGTH[name] / 2 * sum((f * (p - b).square()).sum() for p, b, f in moved)
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(copy_weights(model))
        values.append(penalty.item())
    return weights, values


@pytest.mark.parametrize("name", STRENGTH)
def test_equals_the_penalty_differentiated_in_a_plain_loop(
    name: str,
    regularized: Make,
    make_data: Make,
    make_trainer: Make,
    model_folder: Path,
    make_recorder: Make,
) -> None:
    data, recorder = make_data(), make_recorder()
    module = regularized(
        name,
        schedule="never",
        weight_decay=0.0,
        learning_rate_schedule="constant",
        warmup_ratio=0.0,
        tokens_per_pass=None if name == "bss" else 20,
    )
    trainer = make_trainer(max_steps=5, callbacks=[recorder])
    trainer.fit(module, data)
    weights, values = plain_loop(model_folder, data, name, 5)
    torch.testing.assert_close(penalties(trainer), values, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(recorder.weights, weights, rtol=1e-3, atol=2e-4)
    assert (module.base_weights is None) == (name == "bss")


def test_the_side_of_the_padding_does_not_matter(
    regularized: Make, make_data: Make, make_trainer: Make, make_recorder: Make
) -> None:
    def weights(collate_fn: Callable[..., Any]) -> list[dict[str, Tensor]]:
        data, recorder = make_data(), make_recorder()
        loader = data.train_dataloader

        def other_loader() -> Any:
            made = loader()
            made.collate_fn = collate_fn
            return made

        data.train_dataloader = other_loader
        module = regularized("bss", schedule="never", attention="eager")  # not in one row
        make_trainer(max_steps=3, callbacks=[recorder]).fit(module, data)
        return recorder.weights  # type: ignore[no-any-return]

    def padded_left(texts: Any) -> Any:
        batch = collate(texts, 0)
        order = batch["attention_mask"].argsort(dim=1, stable=True)
        return {name: value.gather(1, order) for name, value in batch.items()}

    right, left = weights(lambda texts: collate(texts, 0)), weights(padded_left)
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bss", "ewc"])
def test_beside_unlearning_a_resumed_run_equals_an_uninterrupted_one(
    name: str,
    regularized: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    make_recorder: Make,
) -> None:
    whole, rest = make_recorder(), make_recorder()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
    module = regularized(name)
    trainer = make_trainer(callbacks=[make_callback(), whole, saver])
    trainer.fit(module, make_data())
    assert module.unlearning_steps == 2
    assert len(penalties(trainer)) == 8
    file = str(next((tmp_path / "kept").glob("*step=4.ckpt")))
    resumed = make_trainer(callbacks=[make_callback(), rest])
    resumed.fit(regularized(name), make_data(), ckpt_path=file)
    torch.testing.assert_close(rest.weights, whole.weights[4:], rtol=0, atol=0)
    assert penalties(resumed) == penalties(trainer)[4:]


def test_an_adapter_is_pulled_to_where_it_started_also_when_resumed(
    regularized: Make, make_data: Make, make_trainer: Make, tmp_path: Path, make_recorder: Make
) -> None:
    from peft import LoraConfig

    def module() -> Any:
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3)
        return regularized("ewc", schedule="never", lora=lora)

    torch.manual_seed(1)
    whole, rest, first = make_recorder(), make_recorder(), module()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(callbacks=[whole, saver])
    with pytest.warns(UserWarning, match="ewc holds half of a new LoRA adapter alone"):
        trainer.fit(first, make_data())
    assert all("lora_" in parameter for parameter in first.base_weights)
    sums = {name: float(f.sum()) for name, f in first._regularizer_fisher.items()}
    assert all((total == 0) == ("lora_A" in name) for name, total in sums.items())
    torch.manual_seed(2)  # the adapter would start elsewhere
    file = str(next((tmp_path / "kept").glob("*step=4.ckpt")))
    resumed = make_trainer(callbacks=[rest])
    resumed.fit(module(), make_data(), ckpt_path=file)
    torch.testing.assert_close(rest.weights, whole.weights[4:], rtol=0, atol=0)
    assert penalties(resumed) == penalties(trainer)[4:]


def test_by_default_a_run_is_pulled_gently_to_the_base_model(
    make_data: Make, make_trainer: Make, model_folder: Path, make_recorder: Make
) -> None:
    def last(**options: Any) -> dict[str, Tensor]:
        module = LWFModule(str(model_folder), learning_rate=1e-2, schedule="never", **options)
        recorder = make_recorder()
        make_trainer(max_steps=3, callbacks=[recorder]).fit(module, make_data())
        return dict(recorder.weights[-1])

    gentle = last(regularizer="l2sp", regularizer_options={"strength": 1e-3})
    torch.testing.assert_close(last(), gentle, rtol=0, atol=0)
    free = last(regularizer=None)
    assert any(not torch.equal(weight, gentle[name]) for name, weight in free.items())


@pytest.mark.parametrize(
    ("name", "precision"), [("bss", "bf16-mixed"), ("ewc", "bf16-mixed"), ("l2sp", "bf16-true")]
)
def test_trains_in_bf16(
    name: str, precision: Any, regularized: Make, make_data: Make, make_trainer: Make
) -> None:
    module = regularized(name, schedule="never")
    trainer = make_trainer(max_steps=3, precision=precision)
    trainer.fit(module, make_data())
    assert trainer.global_step == 3
    assert all(torch.isfinite(torch.tensor(penalties(trainer))))
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizer": "srs"}, "'srs' is an empty slot"),
        ({"regularizer": "bss", "tokens_per_pass": 64}, "bss looks at a step's whole batch"),
        (
            {"learning_loss": "token_forgetting", "tokens_per_pass": 64},
            "learning_loss token_forgetting looks at a step's whole batch",
        ),
        ({"learning_loss_options": {"weight_end": 1.0}}, "'cross_entropy' has no option"),
        ({"regularizer_options": {"strength": 1.0}}, "set model.init_args.regularizer"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    options: dict[str, Any], message: str, make_module: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**options)
