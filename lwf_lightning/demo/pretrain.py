"""Builds the embedded world from a seed: ``python -m lwf_lightning.demo.pretrain``.

Writes the base model, its clean twin and the rows of both tasks; the committed assets were made so.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lwf_lightning.data.batch import Batch, EncodedText, collate
from lwf_lightning.demo.tokenizer import build_tokenizer
from lwf_lightning.demo.world import ASSETS, World, build_world, pretraining_texts, write_rows
from lwf_lightning.losses import per_text_loss


@dataclass(frozen=True)
class PretrainingConfig:
    """The model and how it is pretrained.

    Attributes:
        hidden_size: Width of the model.
        intermediate_size: Width of its feed-forward blocks.
        layers: Number of blocks.
        heads: Attention heads of a block.
        steps: Optimizer steps.
        batch_size: Texts of a step.
        learning_rate: Highest learning rate of AdamW; it warms up over ``warmup_steps`` and then
            falls along a cosine to 0.
        warmup_steps: See above.
        weight_decay: AdamW's decoupled weight decay.
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    steps: int = 1500
    batch_size: int = 96
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1


def new_model(
    tokenizer: PreTrainedTokenizerBase, seed: int, config: PretrainingConfig
) -> LlamaForCausalLM:
    """A Llama with random weights, tied embeddings and the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    twin: bool = False,
    config: PretrainingConfig = PretrainingConfig(),
) -> LlamaForCausalLM:
    """Pretrains the base model or its clean twin from random weights.

    Both start from the same weights and see the same number of texts in the same order; the loss
    is that of every token behind the first. The result is rounded to float16, the precision in
    which it is stored, so that a reloaded model equals a fresh one.

    Args:
        world: What there is to learn.
        tokenizer: Knows every word of the world, see :func:`world_tokenizer`.
        seed: Decides the first weights and the order of the texts.
        twin: Whether to leave the outdated facts out, see :func:`pretraining_texts`.
        config: Model and training.

    Returns:
        A float32 model in evaluation mode.
    """
    texts = [encode(tokenizer, text) for text in pretraining_texts(world, twin=twin)]
    model = new_model(tokenizer, seed, config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / config.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = shuffled(len(texts), seed)
    label = "clean twin" if twin else "base model"
    for _ in track(range(config.steps), description=f"pretraining the {label}"):
        batch = collate([texts[next(order)] for _ in range(config.batch_size)], pad_id(tokenizer))
        loss = per_text_loss(model, batch, reduction="sum").sum() / (batch["labels"] >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return round_to_half(model).eval()
