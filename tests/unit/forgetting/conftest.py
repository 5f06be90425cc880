"""Brute force in float64, one text at a time: what the engine is held against."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lwf_lightning.data.batch import EncodedText

PAD = 0


def text_gradients(
    model: nn.Module, texts: Sequence[EncodedText], reduction: str = "mean"
) -> Iterator[dict[str, Tensor]]:
    """The gradient of each text, by its own forward and backward on a float64 copy."""
    model = copy.deepcopy(model).double().eval()
    for text in texts:
        ids = torch.tensor([text.input_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        loss = functional.cross_entropy(
            logits[0, :-1], torch.tensor(text.labels[1:]), reduction=reduction
        )
        model.zero_grad()
        loss.backward()
        yield {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def fisher_oracle(
    model: nn.Module, texts: Sequence[EncodedText], reduction: str = "mean"
) -> dict[str, Tensor]:
    """The mean of the squared gradients."""
    total: dict[str, Tensor] = {}
    for gradients in text_gradients(model, texts, reduction):
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient**2 / len(texts)
    return total


def confidence_oracle(
    model: nn.Module,
    texts: Sequence[EncodedText],
    fisher: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    alpha: float,
    reduction: str = "mean",
    text_step: str = "gradient",
) -> Tensor:
    """The paper's formula as it stands, constant included."""

    def length(gradients: Mapping[str, Tensor]) -> Any:
        if text_step == "gradient":
            return 1.0
        return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()

    base = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    return torch.stack(
        [
            sum(
                (
                    fisher[name].double()
                    * (base[name] - alpha * gradient / length(gradients) - anchor[name].double())
                    ** 2
                ).sum()
                / 2
                for name, gradient in gradients.items()
            )
            for gradients in text_gradients(model, texts, reduction)
        ]
    )


def nearby_weights(model: nn.Module, *, distance: float = 0.02, seed: int = 1) -> dict[str, Tensor]:
    """An anchor a little way off the weights of the model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + distance * torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and every tensor within 1e-5 of its own largest value."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(
            found[name].double(),
            value,
            rtol=1e-5,
            atol=1e-5 * value.abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def make_model(name: str) -> nn.Module:
    """A small random model, its weights large enough to be far from linear."""
    makers = {
        "llama": lambda: _llama(tied=False),
        "llama_tied": lambda: _llama(tied=True),
        "gpt2": _gpt2,
        "gemma": _gemma,
        "qwen2": _qwen2,
        "gpt_neox": _gpt_neox,
        "lora": _lora,
    }
    return makers[name]()


SHAPE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(*, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=tied)
    ).train()


def _gpt2() -> nn.Module:
    """Conv1D, biases, learned positions, tied embeddings, dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=37,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=32,
        initializer_range=0.2,
        resid_pdrop=0.3,
        embd_pdrop=0.3,
        attn_pdrop=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _shaken(GPT2LMHeadModel(config).train())


def _gemma() -> nn.Module:
    """Norms that scale by 1 + weight; tied embeddings."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    return _shaken(
        GemmaForCausalLM(GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=4)).train()
    )


def _qwen2() -> nn.Module:
    """Biases on query, key and value."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return _shaken(Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)).train())


def _gpt_neox() -> nn.Module:
    """Parallel residual, LayerNorm, fused query-key-value, biases everywhere."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    return _shaken(GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).train())


def _lora() -> nn.Module:
    """A Llama of which only low-rank adapters and one norm train."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, target_modules="all-linear")
    model = get_peft_model(_llama(tied=False), config)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return _shaken(model.train())


def _shaken(model: nn.Module) -> nn.Module:
    """Moves the weights that start at zero or one (biases, norms, half of an adapter)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


class Wrapped(nn.Module):
    """A language model with something around or inside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class ScaledLogits(Wrapped):
    """A parameter that no module of a known kind owns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits * self.scale
        return output


class UsedOutside(Wrapped):
    """A linear layer's weight that is also used behind its back."""

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        weight = self.model.model.layers[0].self_attn.q_proj.weight
        output.logits = output.logits * (1 + weight.mean())
        return output


class SequenceFirst(nn.Module):
    """Works on (tokens, texts, width), perhaps with more tokens than the texts have."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.more = more
        self.table = nn.Embedding(37, 16)
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 37)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = functional.pad(self.table(input_ids).transpose(0, 1), (0, 0, 0, 0, self.more, 0))
        logits = self.head(self.norm(hidden + torch.tanh(self.linear(hidden))))
        return SimpleNamespace(logits=logits.transpose(0, 1)[:, self.more :])


@pytest.fixture
def oracle() -> ModuleType:
    """The functions of this file."""
    return sys.modules[__name__]
