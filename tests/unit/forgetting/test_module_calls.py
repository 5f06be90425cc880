"""What a model may do with the outputs of its modules, and still get the gradients of its texts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lwf_lightning.data.batch import Batch, EncodedText, batches_of
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss

Way = Callable[["Small", Tensor], Tensor]


class Product(nn.Module):
    """A product with its weight, as RMSNorm returns it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


class Small(nn.Module):
    """One of each kind of module, put together in some way."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.table = nn.Embedding(37, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = Product(6)
        self.head = nn.Linear(6, 37)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.way(self, self.table(input_ids))))


def texts_of(count: int, length: int, seed: int = 0) -> list[EncodedText]:
    ids = torch.randint(1, 37, (count, length), generator=torch.Generator().manual_seed(seed))
    return [EncodedText(tuple(row), tuple(row)) for row in ids.tolist()]


IN_PLACE: dict[str, Way] = {
    "an activation": lambda m, h: m.scale(m.norm(h + functional.relu_(m.linear(h)))),
    "a residual": lambda m, h: m.scale(m.norm(m.linear(h).add_(h))),
    "an embedding": lambda m, h: m.scale(m.norm(m.linear(h.mul_(2)))),
    "after a norm": lambda m, h: m.scale(m.linear(functional.relu_(m.norm(h)))),
    "onto a norm": lambda m, h: m.scale(m.linear(m.norm(h).add_(h))),
    "after a product": lambda m, h: m.linear(m.norm(functional.relu_(m.scale(h)))),
    "onto a product": lambda m, h: m.linear(m.norm(m.scale(h).add_(h))),
}


@pytest.mark.parametrize("way", IN_PLACE)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_output_may_be_changed_in_place(
    way: str, checkpointed: bool, oracle: ModuleType
) -> None:
    def run(model: Small, hidden: Tensor) -> Tensor:
        if not checkpointed:
            return IN_PLACE[way](model, hidden)
        copied = lambda hidden: IN_PLACE[way](model, hidden.clone())  # noqa: E731
        return checkpoint(copied, hidden, use_reentrant=False)

    model, texts = Small(run), texts_of(4, 5)

    fisher = diagonal_fisher(model, batches_of(texts, 2, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


def in_order(model: Small, hidden: Tensor) -> Tensor:
    return model.scale(model.norm(model.linear(hidden)))


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, inputs, output: output * 3,
        lambda module, inputs, output: output + module.bias * module.weight.sum(),
    ],
)
@pytest.mark.parametrize("name", ["linear", "norm"])
def test_a_hook_of_the_users_may_return_another_output(
    hook: Any, name: str, oracle: ModuleType
) -> None:
    model, texts = Small(in_order), texts_of(4, 5)
    model.get_submodule(name).register_forward_hook(hook)

    fisher = diagonal_fisher(model, batches_of(texts, 2, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))


class TimesWeight(torch.autograd.Function):
    """A product with a weight that takes part in no operation that torch could tell of."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, backprop: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        return backprop * weight, (backprop * hidden).flatten(0, -2).sum(dim=0)


OUTSIDE: dict[str, Way] = {
    "an operation": lambda m, h: functional.linear(h, m.linear.weight, bias=m.linear.bias),
    "a method": lambda m, h: m.linear(h) * m.linear.weight.mean(),
    "a list": lambda m, h: m.linear(h) + torch.cat([m.linear.bias, m.linear.bias])[:6],
    "parts": lambda m, h: functional.linear(h, torch.cat(m.linear.weight.split(4))),
    "halves": lambda m, h: m.linear(h) + m.linear.weight.chunk(2)[1].mean(dim=0),
    "rows": lambda m, h: m.linear(h) + torch.stack([row.sum() for row in m.linear.weight]),
    "a shape": lambda m, h: m.linear(h) * m.linear.weight.shape[0] / m.linear.weight.stride()[0],
    "a function": lambda m, h: TimesWeight.apply(h, m.linear.bias) @ m.linear.weight,
}


@pytest.mark.parametrize("use", OUTSIDE)
def test_a_later_batch_may_be_the_first_that_uses_a_parameter_outside_its_module(
    use: str, oracle: ModuleType
) -> None:
    def way(model: Small, hidden: Tensor) -> Tensor:
        longer = hidden.shape[1] > 6
        return model.scale(
            model.norm(OUTSIDE[use](model, hidden) if longer else model.linear(hidden))
        )

    model, texts = Small(way), [*texts_of(3, 5), *texts_of(3, 8)]

    fisher = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_as_many_texts_as_tokens(oracle: ModuleType) -> None:
    texts = [*texts_of(5, 5), *texts_of(5, 5, seed=1), *texts_of(2, 5), *texts_of(6, 5)]
    for model in (Small(in_order), oracle.SequenceFirst(), oracle.SequenceFirst(more=1)):
        passes: list[int] = []

        def counted(model: nn.Module, batch: Batch, passes: list[int] = passes) -> Tensor:
            passes.append(len(batch["labels"]))
            return per_text_loss(model, batch)

        batches = [b for part in (texts[:10], texts[10:12]) for b in batches_of(part, 5, 0)]
        batches += batches_of(texts[12:], 6, 0)
        fisher = diagonal_fisher(model, batches, text_loss=counted)

        oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))
        if isinstance(model, Small):  # cut once; then it is known that texts come first
            assert passes == [5, 3, 2, 5, 2, 6]


def one_by_one(model: nn.Module, batch: Batch) -> Tensor:
    """The usual loss, by as many calls of the model as there are texts."""
    losses = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, labels[1:]))
    return torch.stack(losses)


def by_length(model: nn.Module, batch: Batch) -> Tensor:
    """The usual loss of the batch's texts in another order, put in order again."""
    order = batch["attention_mask"].sum(dim=1).argsort()
    return per_text_loss(model, {key: value[order] for key, value in batch.items()})[
        order.argsort()
    ]


@pytest.mark.parametrize("loss", [one_by_one, by_length])
@pytest.mark.parametrize(
    ("name", "trained"),
    [("llama", ""), ("gpt2", ""), ("gpt2", "wte"), ("gpt2", "wpe"), ("gpt2", "mlp"), ("lora", "")],
)
def test_a_loss_may_take_its_texts_one_by_one_or_in_another_order(
    name: str, trained: str, loss: Any, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(5)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and trained in parameter_name)

    batches = list(batches_of(texts, 3, oracle.PAD))
    fisher = diagonal_fisher(model, batches, text_loss=loss)
    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts))

    weights: dict[str, Any] = {"fisher": fisher, "anchor": oracle.nearby_weights(model)}
    own = forgetting_confidence(model, batches, text_loss=loss, **weights)
    usual = forgetting_confidence(model, batches, **weights)
    torch.testing.assert_close(own.alignment, usual.alignment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda batch: batch, 1),
        (lambda batch: {key: value[:, 1:] for key, value in batch.items()}, 1),
        (lambda batch: {key: value.flip(0) for key, value in batch.items()}, 5),
    ],
)
def test_texts_in_order_go_together(change: Any, passes: int, oracle: ModuleType) -> None:
    calls = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(batch)
        return per_text_loss(model, change(batch))

    ids = torch.tensor([text.input_ids for text in texts_of(3, 6)])
    mask = torch.ones_like(ids)
    mask[2, :2] = 0  # padded on the left: the usual loss moves it to the right
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}

    diagonal_fisher(oracle.make_model("gpt2"), [batch], text_loss=counted)

    assert len(calls) == passes
