"""Whole fits with token-level forgetting: equal to a plain loop, resumable, and what it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from lwf_lightning import LWFModule
from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.data.sampler import batch_indices
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.losses import labelled_tokens

Make = Callable[..., Any]
OPTIONS = {"share_kept": 0.6, "weight_start": 0.3, "weight_end": 0.1}


def losses_alone(model: Any, texts: list[EncodedText]) -> Tensor:
    """The loss of each token, each text by itself."""
    return torch.cat([labelled_tokens(model, collate([t], 0)).token_losses() for t in texts])


def plain_loop(folder: Path, data: Any, steps: int) -> list[dict[str, Tensor]]:
    model, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    weights = []
    for step in range(steps):
        texts = [data.learning_encoded[row] for row in batch_indices(24, 4, 0, step)]
        losses = losses_alone(model, texts)
        gains = (losses_alone(base, texts) - losses).tolist()
        if step == 0:  # both are the base model: all tokens are as good
            loss = losses.mean()
        else:
            order = sorted(range(len(gains)), key=lambda token: -gains[token])
            count = round(0.6 * len(gains))
            weight = 0.3 + (0.1 - 0.3) * step / steps
            loss = losses[order[:count]].mean() - weight * losses[order[count:]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(copy_weights(model))
    return weights


def module_of(make_module: Make, **options: Any) -> Any:
    return make_module(learning_loss="token_forgetting", learning_loss_options=OPTIONS, **options)


def test_equals_a_plain_loop(
    make_module: Make, make_data: Make, make_trainer: Make, model_folder: Path, make_recorder: Make
) -> None:
    data, recorder = make_data(), make_recorder()
    module = module_of(
        make_module,
        schedule="never",
        weight_decay=0.0,
        learning_rate_schedule="constant",
        warmup_ratio=0.0,
    )
    make_trainer(max_steps=5, callbacks=[recorder]).fit(module, data)
    expected = plain_loop(model_folder, data, 5)
    torch.testing.assert_close(recorder.weights, expected, rtol=1e-3, atol=2e-4)


def test_dropout_tells_no_tokens_apart(
    make_data: Make, make_trainer: Make, model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    module = LWFModule(str(folder), learning_loss="token_forgetting", schedule="never")
    seen: list[tuple[Tensor, Tensor]] = []

    def remembered(losses: Tensor, base_losses: Tensor, progress: float) -> Tensor:
        seen.append((losses.detach(), base_losses))
        return losses.mean()

    module.learning_loss = remembered  # type: ignore[assignment]
    make_trainer(max_steps=2).fit(module, make_data())
    (losses, base_losses), (later, base_later) = seen
    torch.testing.assert_close(losses, base_losses, rtol=0, atol=0)
    assert not torch.equal(later, base_later)
    with torch.no_grad():  # and there is dropout
        twice = [losses_alone(module.model.train(), first_texts(module)) for _ in range(2)]
    assert not torch.equal(*twice)


def first_texts(module: Any) -> list[EncodedText]:
    return list(module.trainer.datamodule.learning_encoded[:2])


def test_beside_unlearning_and_bss_a_resumed_run_equals_an_uninterrupted_one(
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    make_recorder: Make,
) -> None:
    whole, rest = make_recorder(), make_recorder()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
    module = module_of(make_module, regularizer="bss")
    make_trainer(callbacks=[make_callback(), whole, saver]).fit(module, make_data())
    assert module.unlearning_steps == 2
    file = str(next((tmp_path / "kept").glob("*step=4.ckpt")))
    trainer = make_trainer(callbacks=[make_callback(), rest])
    trainer.fit(module_of(make_module, regularizer="bss"), make_data(), ckpt_path=file)
    torch.testing.assert_close(rest.weights, whole.weights[4:], rtol=0, atol=0)
