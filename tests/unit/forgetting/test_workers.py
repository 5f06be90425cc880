from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from lwf_lightning.data.batch import batches_of
from lwf_lightning.forgetting import gradient_sinks
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.forgetting.workers import Workers

CPU = torch.device("cpu")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workers(three_threads: None) -> Iterator[Workers]:
    workers = Workers(CPU)
    yield workers
    workers.close()


@pytest.mark.parametrize("items", [0, 1, 2, 50])
def test_every_item_is_worked_on_once(workers: Workers, items: int) -> None:
    done: list[int] = []

    workers.run(lambda _, item: done.append(item), list(range(items)))

    assert sorted(done) == list(range(items))


def test_all_threads_work_at_once_each_under_its_own_number(workers: Workers) -> None:
    together = threading.Barrier(3, timeout=60)  # passes only if all three are there
    numbers: list[int] = []

    def work(worker: int, _: int) -> None:
        together.wait()
        numbers.append(worker)

    workers.run(work, [1, 2, 3])

    assert sorted(numbers) == [0, 1, 2]


def test_an_operation_has_one_thread_and_no_gradient_meanwhile(workers: Workers) -> None:
    seen: set[tuple[int, bool]] = set()

    workers.run(
        lambda *_: seen.add((torch.get_num_threads(), torch.is_grad_enabled())), [1, 2, 3, 4]
    )

    assert seen == {(1, False)}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("bad", [0, 7])
def test_what_goes_wrong_in_a_thread_is_raised(workers: Workers, bad: int) -> None:
    def work(_: int, item: int) -> None:
        if item == bad:
            raise ArithmeticError(f"item {item}")

    with pytest.raises(ArithmeticError, match=f"item {bad}"):
        workers.run(work, list(range(20)))
    assert torch.get_num_threads() == 3
    test_every_item_is_worked_on_once(workers, 20)


def test_another_device_has_one_worker() -> None:
    assert Workers(torch.device("meta")).count == 1


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("elements", [1, 50, 16 * 5])
def test_the_number_of_threads_does_not_matter(
    name: str,
    elements: int,
    oracle: ModuleType,
    make_texts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    three_threads: None,
) -> None:
    model, batches = oracle.make_model(name), list(batches_of(make_texts(5), 3, oracle.PAD))
    fisher, anchor = oracle.fisher_oracle(model, make_texts(5)), oracle.nearby_weights(model)
    monkeypatch.setitem(gradient_sinks.BLOCK_ELEMENTS, "cpu", elements)

    def both() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scores = forgetting_confidence(model, batches, fisher=fisher, anchor=anchor)
        return diagonal_fisher(model, batches), scores.confidence

    shared, again = both(), both()
    torch.set_num_threads(1)
    alone = both()

    torch.testing.assert_close(shared, again, rtol=0, atol=0)  # whichever thread was first
    torch.testing.assert_close(shared[1], alone[1], rtol=1e-4, atol=1e-6)
    oracle.assert_near(shared[0], {key: value.double() for key, value in alone[0].items()})
