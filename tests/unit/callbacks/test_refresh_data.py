from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from lwf_lightning.callbacks.refresh_data import fisher_batches, scoring_batches
from lwf_lightning.data.batch import EncodedText, batches_of
from lwf_lightning.forgetting import forgetting_confidence
from lwf_lightning.ranks import Ranks


def datamodule(learning: list[EncodedText], forgetting: list[EncodedText]) -> Any:
    texts = [SimpleNamespace(encoded=lambda text=text: text) for text in forgetting]
    return SimpleNamespace(
        learning_encoded=learning,
        self_knowledge=SimpleNamespace(texts=texts),
        pad_token_id=0,
    )


def lengths(batches: list[Any]) -> list[int]:
    return torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches]).tolist()


def test_scores_come_back_in_the_order_of_the_self_knowledge(
    make_llama: Callable[..., Any], make_texts: Callable[..., list[EncodedText]]
) -> None:
    model, texts = make_llama(), make_texts(11)
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    anchor = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    batches, places = scoring_batches(datamodule([], texts), 3, Ranks())
    assert lengths(batches) == sorted(map(len, texts), reverse=True) != list(map(len, texts))
    sorted_ones = forgetting_confidence(model, batches, fisher=fisher, anchor=anchor)
    expected = forgetting_confidence(model, batches_of(texts, 3, 0), fisher=fisher, anchor=anchor)
    found = sorted_ones.reordered(places)
    torch.testing.assert_close(found.confidence, expected.confidence)
    assert found.alpha == sorted_ones.alpha


def test_fisher_texts_are_drawn_by_the_seed_and_lie_by_length(
    make_texts: Callable[..., list[EncodedText]],
) -> None:
    data = datamodule(make_texts(20), [])
    one, again, other = (fisher_batches(data, 8, 3, seed, Ranks()) for seed in (0, 0, 1))
    torch.testing.assert_close(one, again)
    assert lengths(one) == sorted(lengths(one), reverse=True)
    assert len(lengths(one)) == 8
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
