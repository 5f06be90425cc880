from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lwf_lightning.data.batch import EncodedText, batches_of, collate
from lwf_lightning.losses import labelled_tokens, per_text_loss


def one_by_one(model: Any, texts: list[EncodedText], reduction: str) -> torch.Tensor:
    losses = []
    for text in texts:
        logits = model(torch.tensor([text.input_ids])).logits[0, :-1]
        labels = torch.tensor(text.labels)[1:]
        losses.append(cross_entropy(logits, labels, reduction=reduction, ignore_index=-100))
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_equals_one_text_at_a_time(
    make_llama: Callable[..., Any],
    make_texts: Callable[..., Any],
    batch_size: int,
    reduction: Any,
) -> None:
    model, texts = make_llama().double(), make_texts(7)
    batches = batches_of(texts, batch_size, pad_token_id=0)
    losses = torch.cat([per_text_loss(model, batch, reduction=reduction) for batch in batches])
    torch.testing.assert_close(losses, one_by_one(model, texts, reduction), rtol=1e-9, atol=1e-9)


def test_padding_and_its_token_do_not_matter(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model, texts = make_llama().double(), make_texts(3)
    narrow = collate(texts, pad_token_id=0)
    wide = {
        key: torch.nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0)
        for key, value in narrow.items()
    }
    wide["input_ids"][wide["attention_mask"] == 0] = 5
    torch.testing.assert_close(per_text_loss(model, wide), per_text_loss(model, narrow))


def padded_left(batch: Any) -> Any:
    """Each text's padding moved from its end to its start."""
    order = (batch["attention_mask"] != 0).long().argsort(dim=1, stable=True)
    return {name: value.gather(1, order) for name, value in batch.items()}


@pytest.mark.parametrize("labels", ["answers", "all tokens"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_side_of_the_padding_does_not_matter(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any], name: str, labels: str
) -> None:
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        model: Any = GPT2LMHeadModel(config).eval()
    elif name == "opt":
        sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2}
        model = OPTForCausalLM(
            OPTConfig(vocab_size=37, num_hidden_layers=1, max_position_embeddings=32, **sizes)
        ).eval()
    else:
        model = make_llama()
    texts = make_texts(5)
    if labels == "all tokens":  # the first is never predicted, wherever it stands
        texts = [EncodedText(text.input_ids, text.input_ids) for text in texts]
    right = collate(texts, pad_token_id=0)
    left = padded_left(right)
    assert not left["attention_mask"][:, 0].all()
    expected = per_text_loss(model, right)
    torch.testing.assert_close(per_text_loss(model, left), expected, rtol=0, atol=0)
    more = {**left, "weight": torch.ones(5)}  # which a loss of one's own may read
    torch.testing.assert_close(per_text_loss(model, more), expected, rtol=0, atol=0)


def test_gpt2_and_the_mean_over_tokens_equal_transformers_own_loss(
    make_texts: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    batch = collate(make_texts(5), pad_token_id=0)
    ours = labelled_tokens(model, batch).token_losses().mean()
    torch.testing.assert_close(ours, model(**batch).loss)


def test_a_first_token_with_a_label_costs_nothing_and_pad_may_equal_a_label(
    make_llama: Callable[..., Any],
) -> None:
    # the end-of-text token 2 is also the pad token: the real one keeps its loss
    text = EncodedText((5, 6, 2), (5, 6, 2))
    tokens = labelled_tokens(make_llama(), collate([text, EncodedText((5,) * 6, (5,) * 6)], 2))
    assert tokens.targets[tokens.text == 0].tolist() == [6, 2]
    assert tokens.tokens_per_text().tolist() == [2, 5]


def test_a_batch_without_labels_is_refused(make_llama: Callable[..., Any]) -> None:
    batch = collate([EncodedText((5, 6), (-100, -100))], 0)
    with pytest.raises(ValueError, match="no labelled token"):
        per_text_loss(make_llama(), batch)


def test_an_unknown_reduction_is_refused(make_llama: Callable[..., Any]) -> None:
    batch = {name: torch.tensor([[5, 6, 7]]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="unknown reduction 'avg'; choose one of mean, sum"):
        per_text_loss(make_llama(), batch, reduction="avg")  # type: ignore[arg-type]


def test_labels_on_padding_are_refused(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    batch = collate(make_texts(3), 0)
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(ValueError, match=r"labels stand on padding.*set them to -100"):
        labelled_tokens(make_llama(), batch)


def test_an_encoder_and_decoder_is_refused(make_texts: Callable[..., Any]) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        labelled_tokens(model, collate(make_texts(2), 0))


def test_an_adapter_that_moves_the_tokens_is_refused(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    batch = collate(make_texts(2), 0)
    kinds = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prefix = get_peft_model(make_llama(), PrefixTuningConfig(**kinds))
    assert len(labelled_tokens(prefix, batch).logits) > 0
    prompt = get_peft_model(make_llama(), PromptTuningConfig(**kinds))
    with pytest.raises(TypeError, match="PROMPT_TUNING puts tokens of its own before each text"):
        labelled_tokens(prompt, batch)


def test_what_padding_precedes_is_not_predicted_from_it(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model, batch = make_llama().double(), collate(make_texts(3), 0)
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    left = padded_left(batch)
    own = {"position_ids": (left["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}
    torch.testing.assert_close(per_text_loss(model, left | own), per_text_loss(model, batch))
