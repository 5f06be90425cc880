from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lwf_lightning.data.batch import Batch, batches_of
from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.forgetting.weights import (
    copy_weights,
    exchanged_weights,
    put_back,
    relative_change,
)
from lwf_lightning.losses import per_text_loss
from lwf_lightning.random_state import random_state, restore_random_state


def test_exchange_swaps_and_swaps_back_without_copying(make_llama: Callable[..., Any]) -> None:
    model, other = make_llama(seed=0, tied=True), make_llama(seed=1, tied=True)
    mine, theirs = copy_weights(model), copy_weights(other)
    expected = {name: tensor.clone() for name, tensor in theirs.items()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}

    with exchanged_weights(model, theirs) as held:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=0)
            torch.testing.assert_close(held[name], mine[name], rtol=0, atol=0)

    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == pointers[name]
        torch.testing.assert_close(theirs[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_change_of_weights_is_measured_and_put_back(
    make_llama: Callable[..., Any], dtype: torch.dtype
) -> None:
    model = make_llama(seed=0).to(dtype)
    before = copy_weights(model)
    assert relative_change(model, before) == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_change(model, before) == pytest.approx(0.25, rel=rounding)
    put_back(model, before)
    torch.testing.assert_close(copy_weights(model), before, rtol=0, atol=0)


def test_exchange_ends_after_an_exception(make_llama: Callable[..., Any]) -> None:
    model, theirs = make_llama(seed=0), copy_weights(make_llama(seed=1))
    before = copy_weights(model)
    with pytest.raises(RuntimeError, match="on purpose"), exchanged_weights(model, theirs):
        raise RuntimeError("on purpose")
    torch.testing.assert_close(copy_weights(model), before, rtol=0, atol=0)


def test_exchange_refuses_what_does_not_fit(make_llama: Callable[..., Any]) -> None:
    model = make_llama()
    with (
        pytest.raises(ValueError, match="do not name the model's trainable parameters"),
        exchanged_weights(model, {}),
    ):
        pass
    for other, message in (
        (torch.bfloat16, "is torch.float32 on cpu in the model, torch.bfloat16 on cpu in"),
        (torch.device("meta"), "is torch.float32 on cpu in the model, torch.float32 on meta in"),
    ):
        odd = {name: weight.to(other) for name, weight in copy_weights(model).items()}
        with pytest.raises(ValueError, match=message), exchanged_weights(model, odd):
            pass
    wrong = copy_weights(model)
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:-1]
    with (
        pytest.raises(ValueError, match=r"lm_head\.weight has shape"),
        exchanged_weights(model, wrong),
    ):
        pass


def test_probe_equals_a_hand_written_loop(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model = make_llama()
    batches = list(batches_of(make_texts(7), 3, pad_token_id=0))
    before = copy_weights(model)
    anchor = probe_anchor(model, batches, learning_rate=1e-2, weight_decay=0.1)
    torch.testing.assert_close(copy_weights(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())

    by_hand = make_llama()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / len(batches))
        logits = by_hand(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(anchor, copy_weights(by_hand), rtol=1e-4, atol=1e-5)
    assert any((anchor[name] - before[name]).abs().max() > 1e-3 for name in anchor)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_probe_leaves_every_generator_where_it_was(
    device: str, make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, place = make_llama().to(device), torch.device(device)

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), float(torch.rand((), device=place))]

    def noisy_loss(model: Any, batch: Any) -> torch.Tensor:
        return per_text_loss(model, batch) * sum(draw())

    before = random_state(place)
    batches = list(batches_of(make_texts(4), 2, pad_token_id=0))
    probe_anchor(model, batches, learning_rate=1e-2, text_loss=noisy_loss)
    drawn = draw()
    restore_random_state(before, place)
    assert drawn == draw()


def test_probe_puts_everything_back_when_the_loss_explodes(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model = make_llama()
    model.eval()
    before = copy_weights(model)
    batches = list(batches_of(make_texts(4), 2, pad_token_id=0))
    with pytest.raises(ValueError, match="lower its learning rate"):
        probe_anchor(model, batches * 4, learning_rate=1e25)
    torch.testing.assert_close(copy_weights(model), before, rtol=0, atol=0)
    assert not model.training
    with pytest.raises(ValueError, match="at least one batch"):
        probe_anchor(model, [], learning_rate=1e-2)
    with pytest.raises(ValueError, match="learning rate must be above 0, got 0"):
        probe_anchor(model, batches, learning_rate=0.0)
    unlabelled = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    with pytest.raises(ValueError, match="batch 2 of the probe has nothing to learn: no label"):
        probe_anchor(model, [batches[0], unlabelled], learning_rate=1e-2)
    torch.testing.assert_close(copy_weights(model), before, rtol=0, atol=0)


def test_probe_takes_models_and_batches_of_inference_mode(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    batches = list(batches_of(make_texts(4), 2, pad_token_id=0))
    expected = probe_anchor(make_llama(), batches, learning_rate=1e-2)
    model = make_llama()
    with torch.inference_mode():
        batches = list(batches_of(make_texts(4), 2, pad_token_id=0))
        anchor = probe_anchor(model, batches, learning_rate=1e-2)
        kept = copy_weights(model)
        with exchanged_weights(model, anchor):
            pass
        put_back(model, kept)
    torch.testing.assert_close(anchor, expected)
    held = [*anchor.values(), *kept.values(), *model.parameters()]
    assert not any(tensor.is_inference() for tensor in held)
    per_text_loss(model, next(batches_of(make_texts(2), 2, pad_token_id=0))).sum().backward()


def test_autocast_keeps_no_cast_of_weights_that_were_exchanged_since(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    batches = list(batches_of(make_texts(8), 2, pad_token_id=0))

    def probe(cache: bool) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            return probe_anchor(make_llama(), batches, learning_rate=1e-2)

    torch.testing.assert_close(probe(True), probe(False), rtol=0, atol=0)

    model, others = make_llama(seed=0), copy_weights(make_llama(seed=1))
    before, kept = copy_weights(model), dict(others)
    with torch.autocast("cpu", dtype=torch.bfloat16):

        def loss() -> torch.Tensor:
            return per_text_loss(model, batches[0]).detach()

        first = loss()
        with exchanged_weights(model, others):
            assert not torch.equal(loss(), first)
        torch.testing.assert_close(loss(), first, rtol=0, atol=0)
        put_back(model, kept)
        assert not torch.equal(loss(), first)
        put_back(model, before)
        torch.testing.assert_close(loss(), first, rtol=0, atol=0)


def test_probe_leaves_each_module_in_its_mode(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model = make_llama()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    probe_anchor(model, list(batches_of(make_texts(2), 2, pad_token_id=0)), learning_rate=1e-2)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_probe_needs_something_that_trains(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    model = make_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        probe_anchor(model, list(batches_of(make_texts(2), 2, pad_token_id=0)), learning_rate=1e-2)


def test_probe_gives_a_loss_what_else_the_batch_holds(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    batches = list(batches_of(make_texts(6), 3, pad_token_id=0))
    weighted = [{**batch, "weight": torch.ones(3)} for batch in batches]

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        return per_text_loss(model, batch) * batch["weight"]

    anchor = probe_anchor(make_llama(), weighted, learning_rate=1e-2, text_loss=loss)
    usual = probe_anchor(make_llama(), batches, learning_rate=1e-2, text_loss=per_text_loss)
    torch.testing.assert_close(anchor, usual)


def test_the_change_of_large_tensors_is_exact() -> None:
    model = nn.Linear(4096, 4096, bias=False)
    before = copy_weights(model)
    with torch.no_grad():
        model.weight.add_(model.weight, alpha=0.01)
    assert relative_change(model, before) == pytest.approx(0.01, rel=2e-5)
    only_before = {name: torch.zeros_like(w) for name, w in before.items()}
    only_before["weight"][0, 0] = 1.0
    exact = float((model.weight.detach() - only_before["weight"]).double().square().sum()) ** 0.5
    assert relative_change(model, only_before) == pytest.approx(exact, rel=1e-6)
