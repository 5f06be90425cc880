"""How a call of a module becomes the gradient of one text, block by block.

Each class stands for what one call of a module adds to the gradient of one of its parameters.
It holds captured activations and back-propagated gradients, never a gradient of its own that is
as large as texts x parameters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Call(Protocol):
    """What one call of a module adds to the gradient of one parameter."""

    def write(self, block: Tensor, text: int, start: int, *, add: bool) -> None:
        """Writes a text's gradient into a block, or adds it to what the block holds.

        Args:
            block: Shape (rows, columns): rows ``start`` to ``start + rows`` of the parameter as
                a matrix; a vector is a matrix of one row.
            text: Row of the batch.
            start: First row of the block.
            add: Whether to add; else the block's former content is lost.
        """


class MatrixCall:
    """A matrix product: the gradient of a text is ``left^T @ right``, summed over its tokens.

    Args:
        left: Shape (texts, ..., rows of the parameter).
        right: Shape (texts, ..., columns of the parameter).
        backprop: The one of the two that was back-propagated; tokens where it is zero add
            nothing, so the tokens before the first and after the last other one are skipped.
    """

    def __init__(self, left: Tensor, right: Tensor, backprop: Tensor) -> None:
        self.left = left.flatten(1, -2)
        self.right = right.flatten(1, -2)
        self.spans = _nonzero_spans(backprop.flatten(1, -2))

    def write(self, block: Tensor, text: int, start: int, *, add: bool) -> None:
        """See :class:`Call`."""
        first, stop = self.spans[text]
        left = self.left[text, first:stop, start : start + block.shape[0]].to(block.dtype)
        right = self.right[text, first:stop].to(block.dtype)
        block.addmm_(left.T, right, beta=1 if add else 0)


class EmbeddingCall:
    """A table look-up: the gradient of a text touches the rows of its own tokens only.

    Args:
        token_ids: Shape (texts, ...), int64.
        backprop: Shape (texts, ..., columns of the table).
        padding_idx: A row that never gets a gradient (``nn.Embedding.padding_idx``).
    """

    def __init__(self, token_ids: Tensor, backprop: Tensor, padding_idx: int | None) -> None:
        self.token_ids = token_ids.flatten(1)
        self.backprop = backprop.flatten(1, -2)
        if padding_idx is not None:
            padding = (self.token_ids == padding_idx).unsqueeze(-1)
            self.backprop = self.backprop.masked_fill(padding, 0)
        self._touched: dict[int, tuple[list[int], Tensor]] = {}

    @classmethod
    def joined(cls, calls: Sequence[EmbeddingCall]) -> EmbeddingCall:
        """Several look-ups in one table as one."""
        token_ids = torch.cat([call.token_ids for call in calls], dim=1)
        return cls(token_ids, torch.cat([call.backprop for call in calls], dim=1), None)

    def touched(self, text: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The touched rows, ascending, and their gradients, shape (rows, columns)."""
        rows, inverse = torch.unique(self.token_ids[text], return_inverse=True)
        backprop = self.backprop[text].to(dtype)
        gradients = backprop.new_zeros(len(rows), backprop.shape[-1])
        return rows, gradients.index_add_(0, inverse, backprop)

    def write(self, block: Tensor, text: int, start: int, *, add: bool) -> None:
        """See :class:`Call`."""
        if text not in self._touched:
            rows, gradients = self.touched(text, block.dtype)
            self._touched[text] = (rows.tolist(), gradients)
        touched, gradients = self._touched[text]
        first = bisect_left(touched, start)
        stop = bisect_left(touched, start + block.shape[0])
        if not add:
            block.zero_()
        index = torch.tensor(touched[first:stop], dtype=torch.int64, device=block.device) - start
        block.index_add_(0, index, gradients[first:stop])


class DenseCall:
    """Gradients that are at hand: of a vector, or of one text.

    Args:
        gradients: Shape (texts, rows, columns).
    """

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def write(self, block: Tensor, text: int, start: int, *, add: bool) -> None:
        """See :class:`Call`."""
        gradient = self.gradients[text, start : start + block.shape[0]]
        if add:
            block.add_(gradient)
        else:
            block.copy_(gradient)


Rule: TypeAlias = Callable[[nn.Module, Sequence[str], Sequence[Tensor], Tensor], dict[str, Call]]
"""(module, names of the wanted parameters, inputs, back-propagated gradient) -> a call for each."""


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module's own parameters, or None where only plain autograd is right."""
    forward = type(module).forward
    if "forward" in vars(module):
        return None
    if forward is nn.Linear.forward:
        return _linear
    if forward is Conv1D.forward:
        return _conv1d
    if isinstance(module, nn.Embedding) and (
        forward is nn.Embedding.forward or _is_scaled_embedding(module)
    ):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return _embedding if plain else None
    owns_all = len(list(module.parameters())) == len(list(module.parameters(recurse=False)))
    if owns_all and all(parameter.ndim <= 1 for parameter in module.parameters()):
        return _vectors
    return None


def _is_scaled_embedding(module: nn.Embedding) -> bool:
    """Whether it is a look-up times ``embed_scale``, as transformers calls it in every model."""
    return type(module).__name__.endswith("ScaledWordEmbedding")


def work_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which gradients are formed and reduced: float32, or float64 if it is that."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _linear(
    module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    if "weight" in names:
        calls["weight"] = MatrixCall(backprop, inputs[0], backprop)
    if "bias" in names:
        calls["bias"] = _summed_over_tokens(backprop)
    return calls


def _conv1d(
    module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    if "weight" in names:
        calls["weight"] = MatrixCall(inputs[0], backprop, backprop)
    if "bias" in names:
        calls["bias"] = _summed_over_tokens(backprop)
    return calls


def _embedding(
    module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
) -> dict[str, Call]:
    if _is_scaled_embedding(module):  # type: ignore[arg-type]
        backprop = backprop * torch.as_tensor(module.embed_scale).to(backprop)
    padding_idx: int | None = module.padding_idx  # type: ignore[assignment]
    return {"weight": EmbeddingCall(inputs[0], backprop, padding_idx)}


def _vectors(
    module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
) -> dict[str, Call]:
    """Norms and other modules whose parameters are vectors: run again, text by text."""
    parameters = [module.get_parameter(name) for name in names]
    per_text: list[list[Tensor]] = [[] for _ in names]
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for text in range(backprop.shape[0]):
            output = module.forward(*(tensor.detach()[text : text + 1] for tensor in inputs))
            gradients = torch.autograd.grad(
                output, parameters, backprop[text : text + 1], materialize_grads=True
            )
            for found, gradient in zip(per_text, gradients, strict=True):
                found.append(gradient.reshape(1, -1))
        for parameter in parameters:
            parameter.requires_grad_(False)
    return {name: DenseCall(torch.stack(g)) for name, g in zip(names, per_text, strict=True)}


def _summed_over_tokens(backprop: Tensor) -> DenseCall:
    summed = backprop.flatten(1, -2).sum(dim=1, dtype=work_dtype(backprop))
    return DenseCall(summed.unsqueeze(1))


def _nonzero_spans(backprop: Tensor) -> list[tuple[int, int]]:
    """First and one past the last nonzero token of each text; (0, 0) where all are zero."""
    tokens = backprop.shape[1]
    position = torch.arange(tokens, device=backprop.device)
    active = (backprop.amax(dim=-1) != 0) | (backprop.amin(dim=-1) != 0)  # the fastest exact test
    first = torch.where(active, position, tokens).amin(dim=1)
    stop = torch.where(active, position + 1, 0).amax(dim=1)
    spans = torch.stack([torch.minimum(first, stop), stop], dim=1).tolist()
    return [(span[0], span[1]) for span in spans]
