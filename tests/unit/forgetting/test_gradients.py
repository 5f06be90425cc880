from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lwf_lightning.data.batch import Batch, batches_of
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss

ARCHITECTURES = ["llama", "llama_tied", "gpt2", "gemma", "qwen2", "gpt_neox", "lora"]


class Checkpointed(nn.Module):
    """A layer that checkpoints whatever its mode."""

    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.use_reentrant = use_reentrant

    def forward(self, hidden: Tensor, **rest: Any) -> Tensor:
        return checkpoint(lambda h: self.layer(h, **rest), hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_every_architecture_equals_the_loop(
    name: str, batch_size: int, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(7)

    fisher = diagonal_fisher(model, batches_of(texts, batch_size, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_one_pass_per_batch(
    name: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    passes = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        passes.append(len(batch["labels"]))
        return per_text_loss(model, batch)

    diagonal_fisher(
        oracle.make_model(name), batches_of(make_texts(7), 3, oracle.PAD), text_loss=counted
    )

    assert passes == [3, 3, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(
    side: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(4)
    padded = []
    for batch in batches_of(texts, 2, oracle.PAD):
        extra = (5, 0) if side == "left" else (0, 5)
        padded.append(
            {
                key: nn.functional.pad(value, extra, value=-100 if key == "labels" else 0)
                for key, value in batch.items()
            }
        )

    fisher = diagonal_fisher(model, padded)

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "lora"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    name: str, use_reentrant: bool, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(4)
    expected = oracle.fisher_oracle(model, texts)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    recomputed = []
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    hook = next(layer.children()).register_forward_hook(lambda *_: recomputed.append(1))

    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD))

    hook.remove()
    assert len(recomputed) == 2  # one batch: forward, and again in its backward
    oracle.assert_near(fisher, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_foreign_checkpointing_changes_nothing(
    use_reentrant: bool, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(4)
    layers = model.model.layers
    layers[1].mlp = Checkpointed(layers[1].mlp, use_reentrant)

    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_module_used_twice_adds_up_before_squaring(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model("llama_tied"), make_texts(5)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    assert not any("layers.1.mlp" in name for name in fisher)
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_table_used_twice_adds_up_before_squaring(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    class TwoLookups(nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.table = nn.Embedding(vocabulary, 6, padding_idx=0)
            self.head = nn.Linear(6, vocabulary)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            hidden = self.table(input_ids) * self.table(input_ids.roll(1, dims=1))
            return type("Output", (), {"logits": self.head(hidden)})()

    torch.manual_seed(0)
    model = TwoLookups(37)
    texts = [text for text in make_texts(9) if len(text) == 8] or make_texts(1)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_frozen_parameters_are_left_out(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    assert all("layers.1" in name for name in fisher)
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_a_parameter_that_takes_no_part_gets_zeros(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("llama")
    model.spare = nn.Linear(3, 2)

    fisher = diagonal_fisher(model, batches_of(make_texts(2), 2, oracle.PAD))

    assert fisher["spare.weight"].shape == (2, 3)
    assert not fisher["spare.weight"].any()
    assert fisher["lm_head.weight"].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_it_works_where_gradients_are_off(
    mode: Callable[[], Any], name: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(3)

    anchor, batches = oracle.nearby_weights(model), list(batches_of(texts, 3, oracle.PAD))
    with mode():
        inside = list(batches_of(texts, 3, oracle.PAD))
        fisher = diagonal_fisher(model, inside)
        scores = forgetting_confidence(model, inside, fisher=fisher, anchor=anchor)

    expected = forgetting_confidence(model, batches, fisher=fisher, anchor=anchor)
    torch.testing.assert_close(scores.confidence, expected.confidence)
    assert not any(value.is_inference() for value in (*fisher.values(), scores.alignment))
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def test_bfloat16_and_autocast_come_near(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    texts = make_texts(6)
    expected = oracle.fisher_oracle(oracle.make_model("llama_tied"), texts)
    half = oracle.make_model("llama_tied").to(torch.bfloat16)
    from_half = diagonal_fisher(half, batches_of(texts, 3, oracle.PAD))
    with torch.autocast("cpu", torch.bfloat16):
        from_autocast = diagonal_fisher(
            oracle.make_model("llama_tied"), batches_of(texts, 3, oracle.PAD)
        )

    for name, value in expected.items():
        for found in (from_half[name], from_autocast[name]):
            assert found.dtype == torch.float32
            assert (found - value).norm() < 0.1 * value.norm()


def test_a_loss_of_ones_own(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(4)

    fisher = diagonal_fisher(
        model,
        batches_of(texts, 4, oracle.PAD),
        text_loss=lambda m, batch: 3 * per_text_loss(m, batch),
    )

    expected = oracle.fisher_oracle(model, texts)
    oracle.assert_near(fisher, {name: 9 * value for name, value in expected.items()})
