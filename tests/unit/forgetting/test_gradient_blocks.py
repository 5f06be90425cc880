from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lwf_lightning.data.batch import batches_of
from lwf_lightning.forgetting import gradient_sinks, gradients
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss


class Recorder:
    """A sink that writes down what it is asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.open: str | None = None

    def begin(self, texts: int) -> None:
        self.batches.append([])

    @contextmanager
    def parameter(self, name: str) -> Iterator[Recorder]:
        assert self.open is None
        self.batches[-1].append(name)
        self.open = name
        yield self
        self.open = None

    def take_block(self, rows: slice, gradients: Tensor) -> None:
        assert self.open is not None
        assert gradients.is_contiguous()
        assert gradients.shape[1] == rows.stop - rows.start

    def take_touched(self, rows: Tensor, texts: Tensor, gradients: Tensor) -> None:
        assert self.open is not None
        pairs = list(zip(rows.tolist(), texts.tolist(), strict=True))
        assert len(set(pairs)) == len(gradients)
        assert pairs == sorted(pairs)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("elements", [1, 50, 16 * 5])
def test_blocks_of_any_size_give_the_same(
    name: str,
    elements: int,
    oracle: ModuleType,
    make_texts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, texts = oracle.make_model(name), make_texts(5)
    whole = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))
    monkeypatch.setitem(gradient_sinks.BLOCK_ELEMENTS, "cpu", elements)

    in_blocks = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    oracle.assert_near(in_blocks, {key: value.double() for key, value in whole.items()})


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
@pytest.mark.parametrize("elements", [1, 13, 14, 6 * 3 * 2, 100, 10**6])
def test_row_slices_cover_every_row_once(
    elements: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gradient_sinks.BLOCK_ELEMENTS, "cpu", elements)
    matrix = torch.arange(21.0).view(7, 3)

    slices = gradient_sinks.row_slices(matrix, texts=2, workers=workers)

    torch.testing.assert_close(torch.cat([matrix[rows] for rows in slices]), matrix)
    assert all((rows.stop - rows.start) * 3 * 2 <= max(elements, 3 * 2) for rows in slices)


@pytest.mark.parametrize("name", ["llama_tied", "llama", "gpt2"])
@pytest.mark.parametrize("wrapper", ["", "ScaledLogits"])
def test_a_sink_is_asked_for_every_parameter_once_a_batch_in_one_order(
    name: str, wrapper: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model(name)
    model = getattr(oracle, wrapper)(model) if wrapper else model
    sink = Recorder()

    gradients.reduce_gradients(
        model,
        batches_of(make_texts(6), 3, oracle.PAD),
        sink,
        text_loss=per_text_loss,
        description="",
    )

    assert len(sink.batches) == (6 if wrapper else 2)  # a parameter without a rule: text by text
    assert all(names == sink.batches[0] for names in sink.batches)
    assert sorted(sink.batches[0]) == sorted(name for name, _ in model.named_parameters())
