"""The texts that a refresh of the FisherCallback works on, taken from the datamodule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lwf_lightning.data.batch import Batch, EncodedText, batches_of, collate
from lwf_lightning.data.sampler import batch_indices
from lwf_lightning.ranks import Ranks

if TYPE_CHECKING:
    from lwf_lightning.datamodule import LWFDataModule


def probe_batches(data: LWFDataModule, steps: int, batch_size: int, seed: int) -> list[Batch]:
    """The batches of the probe, one per step, in an order set by the seed."""
    texts = data.learning_encoded
    return [
        collate(
            [texts[index] for index in batch_indices(len(texts), batch_size, seed, step)],
            data.pad_token_id,
        )
        for step in range(steps)
    ]


def fisher_batches(
    data: LWFDataModule, count: int, batch_size: int, seed: int, ranks: Ranks
) -> list[Batch]:
    """At most ``count`` learning texts, chosen by the seed: those behind the Fisher estimate.

    The longest come first, so that little of a batch is padding.
    """
    texts = data.learning_encoded
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(texts), generator=generator)[:count].tolist()
    chosen = sorted((texts[index] for index in drawn), key=len, reverse=True)
    return _batches(chosen, batch_size, data.pad_token_id, ranks)


def scoring_batches(
    data: LWFDataModule, batch_size: int, ranks: Ranks
) -> tuple[list[Batch], list[int]]:
    """All texts of the self-knowledge, the longest first, so that little of a batch is padding.

    Returns:
        The batches, and for each text of the self-knowledge its place among theirs.
    """
    knowledge = data.self_knowledge
    if knowledge is None:
        raise ValueError("elicit the self-knowledge before scoring it")
    texts = [text.encoded() for text in knowledge.texts]
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    places = sorted(range(len(texts)), key=order.__getitem__)
    return _batches([texts[i] for i in order], batch_size, data.pad_token_id, ranks), places


def _batches(
    texts: Sequence[EncodedText], batch_size: int, pad_token_id: int, ranks: Ranks
) -> list[Batch]:
    """Batches for all ranks, small enough that each of them gets some."""
    size = min(batch_size, -(-len(texts) // ranks.world_size))
    return list(batches_of(texts, size, pad_token_id))
