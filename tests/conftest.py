"""Small models and texts that many tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lwf_lightning.data.batch import EncodedText

VOCABULARY = 37


def random_texts(count: int, *, seed: int = 0, longest: int = 11) -> list[EncodedText]:
    """Texts of unequal length whose last tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        prompt = int(torch.randint(1, length - 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        texts.append(EncodedText(tuple(ids), (*[-100] * prompt, *ids[prompt:])))
    return texts


def tiny_llama(*, tied: bool = False, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters in training mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def make_texts() -> Callable[..., list[EncodedText]]:
    return random_texts
