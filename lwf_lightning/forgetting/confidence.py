"""Forgetting confidence: how far a text pulls the weights from what the learning task needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import Batch
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.gradient_rules import work_dtype
from lwf_lightning.forgetting.gradient_sinks import ParameterSink, as_matrix
from lwf_lightning.forgetting.gradients import TextLoss, reduce_gradients
from lwf_lightning.forgetting.tensors import check_fit
from lwf_lightning.forgetting.weights import required_parameters
from lwf_lightning.losses import Reduction, per_text_loss
from lwf_lightning.named import check_name
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import local, ranks_of_shards, sharded_like, whole

TextStep: TypeAlias = Literal["unit", "gradient"]
"""Which step away from theta_base a text's own weights theta*(x) are."""

PRODUCT_LENGTH = 2**16
"""Longest inner product taken at once: on a CPU one running sum holds all of it, and that of two
million float32 numbers is off by 2e-4."""


@dataclass(frozen=True)
class ForgettingConfidence:
    """The forgetting confidence of each text (step 3 of arXiv 2505.19715), in its parts.

    With d = theta_base - theta*_L, g the gradient of a text at theta_base and F the Fisher
    information, the paper's 1/2 sum_i F_i (theta_base_i - alpha g_i - theta*_L,i)^2 is

        FC = 1/2 <F d, d> - alpha <F d, g> + alpha^2/2 <F g, g>.

    The first term is the same for every text and so large that it would drown the ranking. With
    ``text_step="unit"`` g is divided by its norm first.

    Attributes:
        alignment: <F d, g>, shape (texts,), float32 (float64 if the weights are), any sign. High:
            the text's own gradient step leads to the learning task's weights, which *lowers*
            confidence.
        sensitivity: <F g, g>, of the same shape and type, at least 0. High: the text pulls at
            weights that matter to the learning task.
        alpha: Step size of the text's own gradient step, above 0.
        constant: 1/2 <F d, d>, at least 0.
    """

    alignment: Tensor
    sensitivity: Tensor
    alpha: float
    constant: float

    @property
    def confidence(self) -> Tensor:
        """FC without the constant, shape (texts,). High means: forget it."""
        return self.alpha**2 / 2 * self.sensitivity - self.alpha * self.alignment

    def reordered(self, places: Sequence[int]) -> ForgettingConfidence:
        """The same scores in another order of the texts.

        Args:
            places: For each text of the new order, its place in the present one.
        """
        index = torch.tensor(places, device=self.alignment.device)
        return replace(self, alignment=self.alignment[index], sensitivity=self.sensitivity[index])


@torch.inference_mode(False)
def forgetting_confidence(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    fisher: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    alpha: float | None = None,
    text_step: TextStep = "unit",
    reduction: Reduction = "mean",
    text_loss: TextLoss | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> ForgettingConfidence:
    """Scores self-knowledge (D_self): the forgetting confidence FC of each text.

    The result does not depend on how the texts are batched or padded, but with rotary embeddings
    that do (:func:`~lwf_lightning.generation.steady_positions_of`).

    Args:
        model: Any causal LM, holding theta_base.
        batches: Texts to score; dicts of ``input_ids``, ``attention_mask`` and ``labels``, each
            (texts, tokens). Every text needs a label.
        fisher: F_L of :func:`~lwf_lightning.forgetting.diagonal_fisher`: one tensor per
            trainable parameter, at least 0.
        anchor: theta*_L: one tensor per trainable parameter, of its shape.
        alpha: Step size, above 0; None takes :func:`automatic_alpha`.
        text_step: Where a text on its own would lead, theta*(x). ``gradient``, the paper's, is
            theta_base - alpha g. ``unit`` (ours) is theta_base - alpha g / |g|: all texts go
            equally far, so that confidence tells *where* a text pulls. Otherwise the texts that
            the model is least sure of, which have the largest gradients, come first whatever
            they are about; see docs/results/world.md. A text without a gradient stays at
            theta_base.
        reduction: Whether a text's loss is the mean (ours by default; the paper does not say) or
            the sum over its labelled tokens.
        text_loss: Another loss than :func:`~lwf_lightning.losses.per_text_loss`: (model, batch)
            -> (texts,), text i depending on row i only; see
            :data:`~lwf_lightning.forgetting.gradients.TextLoss`. ``reduction`` does not apply to
            it.
        progress: Whether to show a progress bar.
        ranks: The processes that share the batches; each holds the same model, is given all
            batches and gets the whole result. By default this process is alone.

    Returns:
        One value per text, in the order of the batches, on the model's device.

    Raises:
        ValueError: If ``fisher`` or ``anchor`` does not fit the model, ``alpha`` is not above
            0 or infinite, ``text_step`` is unknown, there is no text, nothing trains, or a text
            has no label.
        NonFiniteLossError: If the loss or the score of a text is not finite; a ValueError, too.
    """
    if alpha is not None:
        check_alpha(alpha)
    check_fit(fisher, model, what="fisher")
    check_fit(anchor, model, what="anchor")
    check_name("text_step", text_step, get_args(TextStep))
    sink = _InnerProducts(model, fisher, anchor, with_norms=text_step == "unit")
    loss = text_loss or partial(per_text_loss, reduction=reduction)
    ranks = ranks or ranks_of_shards(model.parameters())
    batches = list(batches)
    reduce_gradients(
        model, batches, sink, text_loss=loss, description="Scoring", progress=progress, ranks=ranks
    )
    alignment, sensitivity, squared_norm = (
        _in_order([sums[row] for sums in sink.sums], batches, ranks).to(sink.device)
        for row in range(3)
    )
    if text_step == "unit":
        # 0 / 0 of a text without a gradient is to be 0; what is not finite stays so
        squared_norm[squared_norm == 0] = 1
        alignment, sensitivity = alignment / squared_norm.sqrt(), sensitivity / squared_norm
    finite = torch.isfinite(alignment) & torch.isfinite(sensitivity)
    if not bool(finite.all()):
        text = int((~finite).nonzero()[0])
        raise NonFiniteLossError(
            f"the score of text {text} (counted from 0 in the order of the batches) is not "
            f"finite: alignment {alignment[text].item()}, sensitivity {sensitivity[text].item()}"
        )
    if alpha is None:
        alpha = automatic_alpha(alignment, sensitivity)
    return ForgettingConfidence(alignment, sensitivity, alpha, sink.constant)


def check_alpha(alpha: float) -> None:
    """Raises ``ValueError`` unless alpha is above 0 and finite."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha}")


def _in_order(values: Sequence[Tensor], batches: Sequence[Batch], ranks: Ranks) -> Tensor:
    """The values of all texts, on every rank, from those of each rank's own texts."""
    sizes = [len(next(iter(batch.values()))) for batch in ranks.share(batches)]
    own = torch.cat([torch.empty(0), *(part.cpu() for part in values)])
    return torch.cat(ranks.merge(torch.split(own, sizes)))


def automatic_alpha(alignment: Tensor, sensitivity: Tensor, multiple: float = 10.0) -> float:
    """Chooses alpha from the scores, whatever the scale of weights and gradients (ours).

    At 2 std(alignment) / std(sensitivity) both terms of the confidence spread equally over the
    texts. Several times that lets the sensitivity lead, which finds planted outdated texts best:
    see docs/results/world.md.

    Args:
        alignment: Shape (texts,).
        sensitivity: Shape (texts,).
        multiple: How many times the alpha of equal spread.

    Returns:
        Above 0. Without a spread to compare (one text; alignment 0 because the anchor is the
        base; equal sensitivities) it is 1: the term that has a spread ranks alone, at any alpha.

    Example:
        >>> automatic_alpha(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 4.0]))
        5.0
        >>> automatic_alpha(torch.zeros(2), torch.tensor([0.0, 4.0]))
        1.0
    """
    if alignment.numel() < 2:
        return 1.0
    spread = alignment.double().std().item()
    other = sensitivity.double().std().item()
    if spread == 0 or other == 0:
        return 1.0
    alpha = multiple * 2 * spread / other
    return alpha if math.isfinite(alpha) and alpha > 0 else 1.0


class _InnerProducts:
    """<F d, g>, <F g, g> and, if asked for, <g, g> of every text."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        fisher: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        with_norms: bool,
    ) -> None:
        self.base = required_parameters(model)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        first = next(iter(self.base.values()))
        self.device, self.dtype = first.device, work_dtype(first)
        constant = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, base in self.base.items():
            self.fisher[name] = sharded_like(fisher[name], base).to(base.device, work_dtype(base))
            self.anchor[name] = sharded_like(anchor[name], base).to(base.device)
            tensors = (local(t) for t in (base, self.anchor[name], self.fisher[name]))
            # in parts that stay in cache
            for part in zip(*(torch.split(t.flatten(), 2**20) for t in tensors), strict=True):
                difference = part[0].to(part[2]) - part[1].to(part[2])
                constant += difference.square_().mul_(part[2]).sum() / 2
        self.constant = sum(ranks_of_shards(self.base.values()).gather(constant.item()))
        self.sums: list[Tensor] = []  # per batch: the three products, shape (3, texts)
        self.with_norms = with_norms

    def begin(self, texts: int) -> None:
        """Adds a place for every text of the batch."""
        self.sums.append(torch.zeros(3, texts, device=self.device, dtype=self.dtype))

    @contextmanager
    def parameter(self, name: str) -> Iterator[ParameterSink]:
        """Adds the parameter's share of the inner products."""
        products = _ParameterProducts(
            as_matrix(whole(self.fisher[name])),
            as_matrix(whole(self.base[name])),
            as_matrix(whole(self.anchor[name])),
            texts=self.sums[-1].shape[1],
            with_norms=self.with_norms,
        )
        yield products
        for _, part in sorted(products.parts.items()):  # in one order, whoever was first
            self.sums[-1] += part


class _ParameterProducts:
    """The inner products of every text over the rows of one parameter.

    Attributes:
        parts: First row of a block -> alignment, sensitivity and squared norm of each text there,
            shape (3, texts).
    """

    def __init__(
        self, fisher: Tensor, base: Tensor, anchor: Tensor, *, texts: int, with_norms: bool
    ) -> None:
        self.fisher = fisher
        self.base = base
        self.anchor = anchor
        self.texts = texts
        self.with_norms = with_norms
        self.parts: dict[int, Tensor] = {}

    def take_block(self, rows: slice, gradients: Tensor) -> None:
        """Two matrix-vector products, the second with the squares."""
        fisher = self.fisher[rows]
        flat = gradients.flatten(1).to(fisher)
        weighted = (self.base[rows].to(fisher) - self.anchor[rows].to(fisher)).mul_(fisher)
        sums = flat.new_zeros(3, len(flat))
        _add_products(sums[0], flat, weighted)
        _add_products(sums[1], flat.square_(), fisher)
        if self.with_norms:
            sums[2] = flat.sum(dim=1)  # of the squares
        self.parts[rows.start] = sums

    def take_touched(self, rows: Tensor, texts: Tensor, gradients: Tensor) -> None:
        """The same with the rows of each text."""
        gradients = gradients.to(self.fisher)
        difference = self.base[rows].to(self.fisher) - self.anchor[rows].to(self.fisher)
        alignment = (difference.mul_(self.fisher[rows]) * gradients).sum(dim=1)
        sensitivity = (self.fisher[rows] * gradients.square_()).sum(dim=1)
        products = torch.stack([alignment, sensitivity, gradients.sum(dim=1)])  # of the squares
        self.parts[0] = products.new_zeros(3, self.texts).index_add_(1, texts, products)


def _add_products(sums: Tensor, vectors: Tensor, weights: Tensor) -> None:
    """Adds the inner product of each vector with the weights, in parts short enough to be exact."""
    weights = weights.flatten()
    for start in range(0, len(weights), PRODUCT_LENGTH):
        part = slice(start, start + PRODUCT_LENGTH)
        sums.addmv_(vectors[:, part], weights[part])
