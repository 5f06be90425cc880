"""Threads that share the blocks of a parameter: each block is one thread's work from end to end.

On a CPU the operations on a block are many and short. Sharing each of them among all threads, as
torch does by itself, spends more on waking threads than it saves, and some of them (matrix-vector
products) are not shared at all. A block per thread keeps every thread busy, and its block in its
own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Workers:
    """As many threads as torch has for an operation on a CPU; one on any other device.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self._others: ThreadPoolExecutor | None = None
        if self.count > 1:
            self._others = ThreadPoolExecutor(
                self.count - 1, "lwf", initializer=torch.set_num_threads, initargs=(1,)
            )

    def run(self, work: Callable[[int, Item], None], items: Sequence[Item]) -> None:
        """Does the work on every item; which worker gets which is not determined.

        Args:
            work: (number of the worker, item); gradients are off. It may be called by several
                threads at once, never twice at once with the same worker.
            items: What to work on, begun in this order.

        Raises:
            Exception: What the work raised first.
        """
        if self._others is None or len(items) < 2:
            for item in items:
                work(0, item)
            return
        left = iter(items)

        @torch.no_grad()  # which each thread has to say for itself
        def take(worker: int) -> None:
            for item in left:
                work(worker, item)

        with _one_thread_each():
            others = [self._others.submit(take, n) for n in range(1, min(self.count, len(items)))]
            try:
                take(0)
            finally:
                wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads."""
        if self._others is not None:
            self._others.shutdown()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
