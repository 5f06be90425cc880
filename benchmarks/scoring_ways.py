"""The ways to score texts, and to estimate a Fisher, that ``benchmarks.scoring`` compares.

Every way goes once over the same batches. Those that others would write get the cheapest form of
the two inner products of a text, <F d, g> and <F g, g>, with F d formed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lwf_lightning.data.batch import Batch
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss

PLAIN = "plain forward + backward"
SCORING = "forgetting_confidence"
FISHER = "diagonal_fisher"
TEXT_BY_TEXT = "one text at a time, backward()"
VMAP = "torch.func.vmap(grad)"
OPACUS = "Opacus GradSampleModule"


def make_model(*, tiny: bool = False) -> LlamaForCausalLM:
    """A random Llama of 27 million parameters, or of a few thousand."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    if tiny:
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**size, vocab_size=4096, num_attention_heads=8, num_key_value_heads=4)
    return LlamaForCausalLM(config).eval()


def make_batch(texts: int, tokens: int) -> Batch:
    """Random texts of which the second half is labelled."""
    token_ids = torch.randint(3, 4096, (texts, tokens))
    labels = token_ids.clone()
    labels[:, : tokens // 2] = -100
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "labels": labels,
    }


def make_ways(model: nn.Module, batches: list[Batch]) -> dict[str, Callable[[], object]]:
    """Every way by name; Opacus only where it is installed."""
    # The anchor lies one step of size 0.01 off; its values do not matter to the time.
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    anchor = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(batch["labels"].shape[0])
    ]

    def plain() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            per_text_loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]

    def text_by_text() -> Tensor:
        weighted, scores = _weighted_difference(model, fisher, anchor), []
        for row in rows:
            model.zero_grad(set_to_none=True)
            per_text_loss(model, row).sum().backward()  # type: ignore[no-untyped-call]
            scores.append(
                _products({n: _gradient(p) for n, p in model.named_parameters()}, weighted, fisher)
            )
        model.zero_grad(set_to_none=True)
        return torch.stack(scores)

    def with_vmap() -> Tensor:
        weighted = _weighted_difference(model, fisher, anchor)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], token_ids: Tensor, answer: Tensor) -> Tensor:
            def call(**inputs: Any) -> Any:
                return functional_call(model, parameters, (), inputs)

            # Without an attention mask, which transformers cannot read under vmap.
            return _answer_losses(call, answer.unsqueeze(0), input_ids=token_ids.unsqueeze(0)).sum()

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        scores = []
        for batch in batches:
            found = gradients(parameters, batch["input_ids"], _answers(batch))
            scores.append(_batch_products(found, weighted, fisher))
        return torch.cat(scores)

    def with_opacus() -> Tensor:
        from opacus.grad_sample import GradSampleModule

        weighted, scores = _weighted_difference(model, fisher, anchor), []
        wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
        wrapped.train()  # it sees nothing in evaluation mode; this model has no dropout
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            losses = _answer_losses(wrapped, _answers(batch), **inputs)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            found = {name: p.grad_sample for name, p in model.named_parameters()}
            scores.append(_batch_products(found, weighted, fisher))
            wrapped.zero_grad(set_to_none=True)
        wrapped.to_standard_module().eval()
        return torch.cat(scores)

    def score() -> Tensor:
        # the paper's step, for which no norm is needed: the other ways compute none
        found = forgetting_confidence(
            model, batches, fisher=fisher, anchor=anchor, text_step="gradient"
        )
        return torch.stack([found.alignment, found.sensitivity], dim=1)

    ways: dict[str, Callable[[], object]] = {
        PLAIN: plain,
        SCORING: score,
        FISHER: lambda: diagonal_fisher(model, batches),
        TEXT_BY_TEXT: text_by_text,
        VMAP: with_vmap,
    }
    if find_spec("opacus") is not None:
        ways[OPACUS] = with_opacus
    return ways


def _answers(batch: Batch) -> Tensor:
    """The labelled half of every text, shape (texts, half)."""
    return batch["labels"][:, int((batch["labels"][0] == -100).sum()) :]


def _answer_losses(call: Callable[..., Any], answers: Tensor, **inputs: Tensor) -> Tensor:
    """The loss of each text, with the head at labelled positions only."""
    half = answers.shape[1]
    logits = call(**inputs, use_cache=False, logits_to_keep=half + 1).logits[:, :-1]
    losses = functional.cross_entropy(logits.mT, answers, reduction="none")
    return losses.mean(dim=1)


def _weighted_difference(
    model: nn.Module, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {n: fisher[n] * (p.detach() - anchor[n]) for n, p in model.named_parameters()}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _products(
    gradients: Mapping[str, Tensor], weighted: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Tensor:
    alignment, sensitivity = torch.zeros(()), torch.zeros(())
    for name, gradient in gradients.items():
        flat = gradient.flatten()
        alignment += torch.dot(flat, weighted[name].flatten())
        sensitivity += torch.dot(flat.square_(), fisher[name].flatten())
    return torch.stack([alignment, sensitivity])


def _batch_products(
    gradients: Mapping[str, Tensor], weighted: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Tensor:
    products = []
    for name, gradient in gradients.items():
        flat = gradient.detach().flatten(1)
        alignment = flat @ weighted[name].flatten()
        products.append(torch.stack([alignment, flat.square_() @ fisher[name].flatten()], dim=1))
    return torch.stack(products).sum(dim=0)
