from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.metrics import choice_log_likelihoods
from lwf_lightning.metrics.shared_prompts import can_share_prompts, share_prompts


def text(prompt: tuple[int, ...], answer: tuple[int, ...]) -> EncodedText:
    return EncodedText(prompt + answer, (-100,) * len(prompt) + answer)


TEXTS = [
    text((5, 6, 7, 8, 9), (10,)),
    text((5, 6, 7, 8, 9), (11, 12, 13)),
    text((5, 6, 7, 8, 9), (11, 14)),
    text((5,), (10, 11)),
    text((5,), (12,)),
    text((5, 6, 7), (8, 9)),
    text((5, 6, 7, 8), (9,)),  # the same tokens, another prompt
    text((20, 21), (10, 11, 12, 13, 14, 15)),
]


def alone(model: Any, texts: list[EncodedText]) -> torch.Tensor:
    sums = []
    for one in texts:
        scores = model(torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
        places = [at for at, label in enumerate(one.labels) if label != -100]
        sums.append(sum(scores[at - 1, one.labels[at]] for at in places))
    return torch.stack(sums)


@torch.no_grad()
@pytest.mark.parametrize("order", [range(8), [0, 3, 1, 4, 2, 7, 6, 5]])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "lora"])
def test_equals_each_text_alone(make_llama: Callable[..., Any], kind: str, order: Any) -> None:
    if kind == "gpt2":
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        )
    else:
        model = make_llama(tied=kind == "tied")
    if kind == "lora":
        settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, settings)
    model = model.double().eval()
    texts = [TEXTS[place] for place in order]
    batch = collate(texts, 0)
    assert can_share_prompts(model, batch["input_ids"].shape[1])
    sums, counts = choice_log_likelihoods(model, batch)
    torch.testing.assert_close(sums, alone(model, texts))
    assert counts.tolist() == [sum(label != -100 for label in one.labels) for one in texts]


def test_a_prompt_is_read_once(make_llama: Callable[..., Any]) -> None:
    shared = share_prompts(collate(TEXTS, 0))
    assert shared["input_ids"].shape[0] == 5
    assert shared["input_ids"][0].tolist() == [9, 10, 9, 11, 12, 13, 9, 11, 14, 5, 6, 7, 8]
    assert shared["position_ids"][0].tolist() == [4, 5, 4, 5, 6, 7, 4, 5, 6, 0, 1, 2, 3]
    assert shared["text"][0].tolist() == [0] * 2 + [1] * 4 + [2] * 3 + [-1] * 4
    assert shared["attention_mask"].sum(1).tolist() == [13, 5, 5, 5, 8]
    model, sizes = make_llama().eval(), []
    model.model.embed_tokens.register_forward_hook(lambda *call: sizes.append(call[1][0].numel()))
    choice_log_likelihoods(model, collate([text((5,) * 30, (6 + n,)) for n in range(8)], 0))
    *trial, size = sizes
    assert (len(trial), size) == (3, 8 * 2 + 29)


@torch.no_grad()
@pytest.mark.parametrize("change", [{"sliding_window": 4}, {"attn_implementation": "eager"}])
def test_models_that_take_no_such_mask(change: dict[str, Any]) -> None:
    settings = {"sliding_window": None, **change}
    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )
    model = MistralForCausalLM._from_config(config, attn_implementation=attention).double().eval()
    assert not can_share_prompts(model, 8)
    sums, _ = choice_log_likelihoods(model, collate(TEXTS, 0))
    torch.testing.assert_close(sums, alone(model, TEXTS))


SETTINGS = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Roberta", {"is_decoder": True, "pad_token_id": 1}),  # counts positions from its pad token
        ("Falcon", {"alibi": True}),  # needs a mask of padding
    ],
)
def test_models_that_a_mask_misleads_are_found_out(name: str, change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SETTINGS, **change)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    assert can_share_prompts(model, 8)
    sums, _ = choice_log_likelihoods(model, collate(TEXTS, 0))
    torch.testing.assert_close(sums, alone(model, TEXTS), rtol=1e-6, atol=0)


@torch.no_grad()
def test_under_autocast(make_llama: Callable[..., Any]) -> None:
    model = make_llama().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, _ = choice_log_likelihoods(model, collate(TEXTS, 0))
    torch.testing.assert_close(sums, alone(model, TEXTS), atol=0.05, rtol=0.02)
