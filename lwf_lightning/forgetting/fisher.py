"""Diagonal Fisher information of the learning task (step 2 of the paper)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lwf_lightning.data.batch import Batch
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.gradient_rules import work_dtype
from lwf_lightning.forgetting.gradient_sinks import ParameterSink, as_matrix
from lwf_lightning.forgetting.gradients import TextLoss, reduce_gradients
from lwf_lightning.forgetting.weights import trainable_parameters
from lwf_lightning.losses import LabelledTokens, Reduction, labelled_tokens, per_text_loss
from lwf_lightning.named import check_name
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import added_by_all, local, ranks_of_shards

FisherEstimator: TypeAlias = Literal["empirical", "true"]


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    estimator: FisherEstimator = "empirical",
    reduction: Reduction = "mean",
    seed: int = 0,
    text_loss: TextLoss | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Estimates the diagonal of the Fisher information F_L at the weights the model holds.

    It is the mean over texts of the *squared gradient of each text* (arXiv 2505.19715, step 2),
    which is not the square of a batch's mean gradient. It does not depend on how the texts are
    batched or padded, but with rotary embeddings that do
    (:func:`~lwf_lightning.generation.steady_positions_of`).

    Args:
        model: Any causal LM, holding theta*_L.
        batches: Texts of the learning task; dicts of ``input_ids``, ``attention_mask`` and
            ``labels``, each (texts, tokens). Every text needs a label.
        estimator: ``empirical`` takes the labels as they are (the gold answers). ``true`` draws
            one label per labelled token from the model's own prediction there, given the gold
            tokens before it.
        reduction: Whether a text's loss is the mean (ours by default; the paper does not say) or
            the sum over its labelled tokens.
        seed: Seed of ``true``; a text's draw depends on the seed and its place in the order only.
        text_loss: Another loss than :func:`~lwf_lightning.losses.per_text_loss`: (model, batch)
            -> (texts,), text i depending on row i only; see
            :data:`~lwf_lightning.forgetting.gradients.TextLoss`. ``reduction`` does not apply to
            it, and it goes with ``empirical`` only.
        progress: Whether to show a progress bar.
        ranks: The processes that share the batches; each holds the same model, is given all
            batches and gets the whole result. By default this process is alone.

    Returns:
        Parameter name -> float32 tensor (float64 if the parameter is) of the parameter's shape, on
        its device, at least 0; trainable parameters only, a tied one once.

    Raises:
        ValueError: If there is no text, nothing trains, a text has no label, or ``estimator`` is
            unknown or does not go with ``text_loss``.
        NonFiniteLossError: If a loss or the result is not finite; a ValueError, too.
    """
    sums, texts = fisher_sums(
        model,
        batches,
        estimator=estimator,
        reduction=reduction,
        seed=seed,
        text_loss=text_loss,
        progress=progress,
        ranks=ranks,
    )
    for name, total in sums.items():
        total /= texts
        held = local(total)
        if held.numel() and not bool(torch.isfinite(held.amax())):  # no square is below 0
            raise NonFiniteLossError(f"the Fisher information of {name} is not finite")
    return sums


@torch.inference_mode(False)
def fisher_sums(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    estimator: FisherEstimator = "empirical",
    reduction: Reduction = "mean",
    seed: int = 0,
    text_loss: TextLoss | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The sum of all texts' squared gradients and their number; see :func:`diagonal_fisher`."""
    ranks = ranks or ranks_of_shards(model.parameters())
    check_name("estimator", estimator, get_args(FisherEstimator))
    loss = text_loss or partial(per_text_loss, reduction=reduction)
    if estimator == "true":
        if text_loss is not None:
            raise ValueError(
                "estimator 'true' draws labels for the default loss and cannot do so for a "
                "`text_loss` of your own; take 'empirical'"
            )
        batches = _numbered(batches)
        loss = partial(_sampled_loss, reduction=reduction, seed=seed)
    sink = _SquareSums(model)
    texts = reduce_gradients(
        model, batches, sink, text_loss=loss, description="Fisher", progress=progress, ranks=ranks
    )
    for total in sink.sums.values():
        if not isinstance(total, DTensor):  # which has been added up while it was formed
            ranks.sum(total)
    return sink.sums, sum(ranks.gather(texts))


class _SquareSums:
    """Adds up squared gradients, one tensor per parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.sums = {
            name: torch.zeros_like(p, dtype=work_dtype(p), memory_format=torch.contiguous_format)
            for name, p in trainable_parameters(model).items()
        }

    def begin(self, texts: int) -> None:
        """Nothing is kept per text."""

    @contextmanager
    def parameter(self, name: str) -> Iterator[ParameterSink]:
        """Adds to the parameter's sum."""
        with added_by_all(self.sums[name]) as sums:
            yield _ParameterSquares(as_matrix(sums))


@dataclass(frozen=True)
class _ParameterSquares:
    """Adds the squared gradients of all texts to one parameter's sum."""

    sums: Tensor

    def take_block(self, rows: slice, gradients: Tensor) -> None:
        """Adds the squares of all texts at once: few operations, each large enough to be shared."""
        self.sums[rows].add_(gradients.square_().sum(dim=0))  # `+=` would copy it once more

    def take_touched(self, rows: Tensor, texts: Tensor, gradients: Tensor) -> None:
        """Adds to the touched rows; a row that several texts touched comes several times."""
        self.sums.index_add_(0, rows, gradients.square_().to(self.sums))


def _numbered(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Gives every text its place in the order of all texts, whatever the batch size."""
    first = 0
    for batch in batches:
        texts = batch["input_ids"].shape[0]
        yield {**batch, "text_number": torch.arange(first, first + texts)}
        first += texts


def _sampled_loss(model: nn.Module, batch: Batch, *, reduction: Reduction, seed: int) -> Tensor:
    tokens = labelled_tokens(model, batch)
    uniform = torch.cat(
        [
            torch.rand(count, generator=_generator(seed, number), dtype=torch.float64)
            for number, count in zip(
                batch["text_number"].tolist(), tokens.tokens_per_text().tolist(), strict=True
            )
        ]
    )
    targets = _drawn(tokens.logits.detach(), uniform)
    drawn: LabelledTokens = replace(tokens, targets=targets)
    return drawn.per_text(drawn.token_losses(), reduction)


def _generator(seed: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws a class per row of logits by inverting its distribution function."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)
