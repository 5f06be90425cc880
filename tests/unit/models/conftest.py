"""Small models and tokenizers that were saved to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lwf_lightning.losses import per_text_loss

INPUT = torch.tensor([[5, 9, 11, 7], [3, 4, 36, 2]])
BATCH = {"input_ids": INPUT, "attention_mask": torch.ones_like(INPUT), "labels": INPUT}


def save_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def folder(make_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """A bfloat16 checkpoint with tied embeddings, and a tokenizer without a pad token."""
    make_llama(tied=True).bfloat16().save_pretrained(tmp_path / "saved")
    save_tokenizer(tmp_path / "saved", eos_token="<eos>")
    return tmp_path / "saved"


def take_steps(model: Any) -> None:
    """Two steps that move every adapter weight."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first moves B away from zero, the second A as well
        optimizer.zero_grad()
        per_text_loss(model, BATCH).mean().backward()
        optimizer.step()


@pytest.fixture(name="save_tokenizer")
def make_save_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return save_tokenizer


@pytest.fixture(name="take_steps")
def make_take_steps() -> Callable[[Any], None]:
    return take_steps
