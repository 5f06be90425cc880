"""How a call of a module becomes the gradients of its texts, block by block.

Each class stands for what one call of a module adds to the gradient of one of its parameters.
It holds captured activations and back-propagated gradients, never a gradient of its own that is
as large as texts x parameters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.pytorch_utils import Conv1D


class Call(Protocol):
    """What one call of a module adds to the gradient of one parameter."""

    def prepare(self, dtype: torch.dtype) -> None:
        """Does once what all blocks need; the blocks are then written by several threads.

        Args:
            dtype: The type of the blocks.
        """

    def write(self, block: Tensor, start: int, *, add: bool) -> None:
        """Writes the gradients of all texts into a block, or adds them to what the block holds.

        Args:
            block: Shape (texts, rows, columns), contiguous: rows ``start`` to ``start + rows`` of
                the parameter as a matrix; a vector is a matrix of one row.
            start: First row of the block.
            add: Whether to add; else the block's former content is lost.
        """


class MatrixCall:
    """A matrix product: the gradient of a text is ``left^T @ right``, summed over its tokens.

    Args:
        left: Shape (texts, ..., rows of the parameter).
        right: Shape (texts, ..., columns of the parameter).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left.flatten(1, -2)
        self.right = right.flatten(1, -2)

    def prepare(self, dtype: torch.dtype) -> None:
        """See :class:`Call`."""
        self.right = self.right.to(dtype)

    def write(self, block: Tensor, start: int, *, add: bool) -> None:
        """See :class:`Call`."""
        left = self.left[:, :, start : start + block.shape[1]].to(block.dtype)
        block.baddbmm_(left.mT, self.right, beta=1 if add else 0)


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

    @classmethod
    def joined(cls, calls: Sequence[EmbeddingCall]) -> EmbeddingCall:
        """Several look-ups in one table as one."""
        token_ids = torch.cat([call.token_ids for call in calls], dim=1)
        return cls(token_ids, torch.cat([call.backprop for call in calls], dim=1), None)

    def touched(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The touched rows, ascending, the text that touched each, and its gradient there.

        Shapes (touched,), (touched,) and (touched, columns); no pair of row and text comes twice.
        """
        texts = self.token_ids.shape[0]
        owner = torch.arange(texts, device=self.token_ids.device).unsqueeze(1)
        pairs, inverse = torch.unique(self.token_ids * texts + owner, return_inverse=True)
        backprop = self.backprop.flatten(0, 1).to(dtype)
        gradients = backprop.new_zeros(len(pairs), backprop.shape[-1])
        gradients.index_add_(0, inverse.flatten(), backprop)
        return pairs // texts, pairs % texts, gradients

    def prepare(self, dtype: torch.dtype) -> None:
        """See :class:`Call`."""
        self._prepared = self.touched(dtype)
        self._rows = self._prepared[0].tolist()

    def write(self, block: Tensor, start: int, *, add: bool) -> None:
        """See :class:`Call`."""
        height = block.shape[1]
        here = slice(bisect_left(self._rows, start), bisect_left(self._rows, start + height))
        rows, texts, gradients = (tensor[here] for tensor in self._prepared)
        if not add:
            block.zero_()
        block.flatten(0, 1).index_add_(0, texts * height + rows - start, gradients)


class DenseCall:
    """Gradients that are at hand: of vectors, or of one text.

    Args:
        gradients: Shape (texts, rows, columns).
    """

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def prepare(self, dtype: torch.dtype) -> None:
        """See :class:`Call`: nothing is left to do."""

    def write(self, block: Tensor, start: int, *, add: bool) -> None:
        """See :class:`Call`."""
        gradients = self.gradients[:, start : start + block.shape[1]]
        if add:
            block.add_(gradients)
        else:
            block.copy_(gradients)


Rule: TypeAlias = Callable[[nn.Module, Sequence[str], Sequence[Any], Tensor], dict[str, Call]]
"""(module, names of the wanted parameters, inputs, back-propagated gradient) -> a call for each.
The inputs of :class:`VectorRule` end with the output, or None where it is not to be had."""


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
        return VectorRule()
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
        calls["weight"] = MatrixCall(backprop, inputs[0])
    if "bias" in names:
        calls["bias"] = _summed_over_tokens(backprop)
    return calls


def _conv1d(
    module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    if "weight" in names:
        calls["weight"] = MatrixCall(inputs[0], backprop)
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


class VectorRule:
    """Norms and other modules whose parameters are vectors.

    They are run again, with a copy of the parameters per text. What that gives for the first batch
    tells whether the module returns a product with its weight, as RMSNorm does: then that product
    holds all that the gradient needs.
    """

    def __init__(self) -> None:
        self.batched = True
        self.is_product: bool | None = None

    @property
    def may_be_product(self) -> bool:
        """Whether the output may be needed."""
        return self.is_product is not False

    def __call__(
        self, module: nn.Module, names: Sequence[str], inputs: Sequence[Any], backprop: Tensor
    ) -> dict[str, Call]:
        """See :data:`Rule`."""
        *inputs, output = inputs
        if output is None:
            self.is_product = False
        if self.is_product:
            gradients: Sequence[Tensor] = [_gradient_of_product(module, output, backprop)]
        else:
            gradients = self._run_again(module, names, inputs, backprop)
            if self.is_product is None:
                self.is_product = _is_product(module, output, backprop, gradients)
        return {
            name: DenseCall(gradient.reshape(backprop.shape[0], 1, -1))
            for name, gradient in zip(names, gradients, strict=True)
        }

    def _run_again(
        self, module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
    ) -> Sequence[Tensor]:
        if self.batched:
            try:
                return self._all_texts(module, names, inputs, backprop)
            except RuntimeError:  # a forward that vmap cannot take, as that of a fused kernel
                self.batched = False
        parts = [
            self._one_text(module, names, [t[i : i + 1] for t in inputs], backprop[i : i + 1])
            for i in range(backprop.shape[0])
        ]
        return [torch.stack(part) for part in zip(*parts, strict=True)]

    @staticmethod
    def _all_texts(
        module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
    ) -> Sequence[Tensor]:
        texts, forward = backprop.shape[0], _Forward(module)
        copies = {
            f"module.{name}": p.detach().expand(texts, *p.shape).clone().requires_grad_()
            for name, p in ((name, module.get_parameter(name)) for name in names)
        }

        def run(parameters: dict[str, Tensor], *text: Tensor) -> Tensor:
            output: Tensor = functional_call(forward, parameters, text)
            return output

        with torch.enable_grad():
            output = vmap(run)(copies, *(tensor.detach().unsqueeze(1) for tensor in inputs))
            return torch.autograd.grad(
                output, list(copies.values()), backprop.unsqueeze(1), materialize_grads=True
            )

    @staticmethod
    def _one_text(
        module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], backprop: Tensor
    ) -> Sequence[Tensor]:
        parameters = [module.get_parameter(name) for name in names]
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            output = module.forward(*(tensor.detach() for tensor in inputs))
            gradients = torch.autograd.grad(output, parameters, backprop, materialize_grads=True)
            for parameter in parameters:
                parameter.requires_grad_(False)
        return gradients


class _Forward(nn.Module):
    """A module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module.forward(*inputs)


def _is_product(
    module: nn.Module, output: Tensor, backprop: Tensor, gradients: Sequence[Tensor]
) -> bool | None:
    """Whether :func:`_gradient_of_product` gives the gradients; None if these cannot tell."""
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    weight = module.get_parameter("weight")
    if output.shape[-1:] != weight.shape:  # it stands for another dimension than the last
        return False
    if output.dtype != work_dtype(output) or not bool(weight.all()):
        return False
    mine, theirs = _gradient_of_product(module, output, backprop), gradients[0]
    if mine.shape != theirs.shape:
        return False
    if not bool(theirs.any()):
        return None
    largest = theirs.abs().amax()
    return bool(((mine - theirs).abs() <= 1e-4 * theirs.abs() + 1e-5 * largest).all())


def _gradient_of_product(module: nn.Module, output: Tensor, backprop: Tensor) -> Tensor:
    """Of ``weight * input``, summed over the tokens of each text: shape (texts, columns)."""
    return (backprop * output).flatten(1, -2).sum(dim=1) / module.get_parameter("weight")


def _summed_over_tokens(backprop: Tensor) -> DenseCall:
    summed = backprop.flatten(1, -2).sum(dim=1, dtype=work_dtype(backprop))
    return DenseCall(summed.unsqueeze(1))
