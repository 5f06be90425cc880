"""The order of batches as a pure function of seed and step, and a loader that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Sampler

from lwf_lightning.data.batch import Batch, EncodedText, filler

Item = TypeVar("Item")


@lru_cache(maxsize=8)
def pass_order(n: int, seed: int, pass_index: int) -> tuple[int, ...]:
    """The order of ``n`` texts in one pass over them: the same on every rank and machine."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + pass_index)
    return tuple(torch.randperm(n, generator=generator).tolist())


def batches_per_pass(n: int, batch_size: int, world_size: int = 1) -> int:
    """How many global batches one pass over ``n`` texts gives, at least 1."""
    return max(1, n // (batch_size * world_size))


def batch_indices(
    n: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> list[int]:
    """Which texts make up the batch of one step: a pure function, with no state to save.

    Every pass goes through the texts in a new order. Its last, partial batch is dropped. All ranks
    together take what one process would take with ``batch_size * world_size``, and share it
    without repeats. When the texts are too few for one global batch, every step is a pass of its
    own over all of them, and a rank may get fewer than the others, or none.

    Args:
        n: Number of texts.
        batch_size: Texts per rank and step.
        seed: Seed of the order.
        step: Step since the beginning, over all passes, from 0.
        rank: This process.
        world_size: Number of processes.

    Returns:
        Indices below ``n``: ``batch_size`` of them unless ``n`` is below
        ``batch_size * world_size``.

    Raises:
        ValueError: If ``n`` or ``batch_size`` is below 1, ``step`` below 0, or ``rank`` not below
            ``world_size``.

    Example:
        >>> sorted(batch_indices(4, 2, seed=0, step=0) + batch_indices(4, 2, seed=0, step=1))
        [0, 1, 2, 3]
    """
    if n < 1 or batch_size < 1 or step < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"no batch for n={n}, batch_size={batch_size}, step={step}, rank={rank}, "
            f"world_size={world_size}"
        )
    pass_index, position = divmod(step, batches_per_pass(n, batch_size, world_size))
    order = pass_order(n, seed, pass_index)
    start = position * batch_size * world_size
    return list(order[start : start + batch_size * world_size][rank::world_size])


def filled_indices(
    n: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> list[int]:
    """As :func:`batch_indices`, as many on every rank: the index ``n`` stands for a filler.

    Example:
        >>> [filled_indices(1, 4, 0, 0, rank, world_size=2) for rank in range(2)]
        [[0], [1]]
    """
    indices = batch_indices(n, batch_size, seed, step, rank, world_size)
    rows = min(batch_size, -(-n // world_size))
    return indices + [n] * (rows - len(indices))


def even_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Splits ``total`` as evenly as the sizes allow; what a small one lacks goes to the others.

    Example:
        >>> even_shares([10, 2, 10], total=12)
        [5, 2, 5]
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    for done, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        shares[index] = min(sizes[index], left // (len(sizes) - done))
        left -= shares[index]
    return shares


def seeded_sample(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most ``limit`` items, chosen by the seed and kept in order; all without a limit."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(pass_order(len(items), seed, 0)[:limit])]


class StepSampler(Sampler[list[int]]):
    """The batches of one pass, from a given step on; see :func:`filled_indices`."""

    def __init__(
        self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """See :func:`batch_indices`."""
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.first_step = 0

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return batches_per_pass(self.n, self.batch_size, self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """As many batches as a pass has, from ``first_step`` on.

        Lightning ends the epoch; one that a limit cuts short leaves its rest to the next.
        """
        for step in range(self.first_step, self.first_step + len(self)):
            yield filled_indices(
                self.n, self.batch_size, self.seed, step, self.rank, self.world_size
            )


class ResumableLoader(DataLoader[EncodedText]):
    """A shuffled loader that continues after a restart with the very next batch.

    Its state is the number of batches it has handed out (not the number that workers have
    fetched ahead). It draws nothing from the global random state.
    """

    def __init__(
        self,
        texts: Sequence[EncodedText],
        batch_size: int,
        seed: int,
        collate: Callable[[Sequence[EncodedText]], Batch],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        """Makes a loader over ``texts``; the other arguments are those of :func:`batch_indices`."""
        self._sampler = StepSampler(len(texts), batch_size, seed, rank, world_size)
        self._step = 0
        super().__init__(
            [*texts, filler(texts[0])],  # type: ignore[arg-type]  # a map-style dataset
            batch_sampler=self._sampler,
            collate_fn=collate,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """As many batches as a pass has, after those handed out when the first is asked for."""
        self._sampler.first_step = self._step
        for batch in super().__iter__():
            self._step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out so far, over all passes."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after ``state["step"]`` batches."""
        self._step = int(state["step"])
