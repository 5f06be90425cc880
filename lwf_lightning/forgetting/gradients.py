"""The engine below Fisher and confidence: the gradient of every text, reduced as it is formed.

The gradient of a linear layer for one text is ``backprop^T @ activation``, so one batched forward
and backward holds all that is needed. Hooks capture both while the weights themselves need no
gradient; the gradients of all texts are formed together in blocks of rows that stay in cache,
handed to a sink that reduces them at once, and dropped. Nothing of size texts x parameters is ever
stored.

Parameters without such a rule are found by themselves: then texts pass one at a time and plain
autograd forms the gradient of those parameters, which is slower and just as exact.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lwf_lightning.data.batch import IGNORE_INDEX, Batch
from lwf_lightning.forgetting.gradient_rules import (
    Call,
    DenseCall,
    EmbeddingCall,
    Rule,
    rule_of,
    work_dtype,
)
from lwf_lightning.forgetting.parameter_uses import OutsideUses, owners_of
from lwf_lightning.forgetting.weights import trainable_parameters

TextLoss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> one loss per text, shape (texts,). The loss of text i may depend on row i of
the batch only."""

BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Elements of one block, all texts together: on a CPU it stays in the last cache and is large
enough for every thread; on a GPU it fills the device."""


class ParameterSink(Protocol):
    """Reduces the gradients of one parameter, for all texts of a batch.

    The parameter is seen as a matrix, see :func:`as_matrix`. The engine calls either
    :meth:`take_block` for consecutive slices that together hold every row once, or
    :meth:`take_touched` once. Gradients come in float32 (float64 for a float64 parameter) and may
    be overwritten.
    """

    def take_block(self, rows: slice, gradients: Tensor) -> None:
        """Takes in some rows of every text's gradient.

        Args:
            rows: The rows.
            gradients: Shape (texts, rows, columns), contiguous.
        """

    def take_touched(self, rows: Tensor, texts: Tensor, gradients: Tensor) -> None:
        """Takes in gradients of which few rows differ from zero.

        Args:
            rows: Shape (touched,), int64, ascending.
            texts: Shape (touched,), int64: whose gradient; no pair (row, text) comes twice.
            gradients: Shape (touched, columns).
        """


class GradientSink(Protocol):
    """Reduces the gradients of texts to what is wanted of them.

    For every batch the engine calls :meth:`begin`, then :meth:`parameter` once for each parameter
    that takes part in the loss, as soon as its gradients can be formed and while the backward
    pass still runs. What a parameter needs (its Fisher information, an accumulator) is asked for
    at no other time, so a sink may gather it when the context is entered and let go of it, or
    add it up over processes, when the context is left. The contexts never overlap, and their
    order follows from model and loss alone: it is the same in every process that runs both.
    """

    def begin(self, texts: int) -> None:
        """Gets ready for a batch of this many texts, counted from 0 in the calls that follow."""

    def parameter(self, name: str) -> AbstractContextManager[ParameterSink]:
        """What takes in the gradients of a parameter; entered and left once per batch."""


def as_matrix(tensor: Tensor) -> Tensor:
    """A parameter as (rows, columns): a vector or a number is one row; more axes are columns."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def row_slices(matrix: Tensor, texts: int) -> Iterator[slice]:
    """Cuts a matrix into runs of rows that hold about ``BLOCK_ELEMENTS`` over all texts."""
    elements = BLOCK_ELEMENTS.get(matrix.device.type, BLOCK_ELEMENTS["cuda"])
    rows, step = matrix.shape[0], max(1, elements // max(1, texts * matrix.shape[1]))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def reduce_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    sink: GradientSink,
    *,
    text_loss: TextLoss,
    description: str,
    progress: bool = False,
) -> int:
    """Hands the gradient of every text, for every trainable parameter, to a sink.

    The model is run in evaluation mode (a layer that checkpoints its activations goes on doing
    so) and left exactly as it was: ``.grad``, ``requires_grad``, hooks and modes. It works where
    gradients are off, as in a validation hook; the caller has to leave inference mode.

    Args:
        model: Any causal LM; its trainable parameters are those that require a gradient.
        batches: Batches on any device; each row is a text with at least one label.
        sink: What reduces the gradients.
        text_loss: The loss of each text.
        description: Label of the progress bar.
        progress: Whether to show one.

    Returns:
        How many texts there were.

    Raises:
        ValueError: If nothing trains, there is no text, a text has no label, or a loss is not
            finite or not of shape (texts,).
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter: all of them are frozen")
    device = next(iter(parameters.values())).device
    torch.clear_autocast_cache()  # it may hold casts of weights that were exchanged since
    with (
        torch.enable_grad(),
        _evaluation_mode(model),
        _Capture(model, parameters, sink, text_loss) as capture,
    ):
        for number, batch in enumerate(tqdm(batches, desc=description, disable=not progress)):
            _check_labels(batch, number)
            capture.reduce({key: _usable(value, device) for key, value in batch.items()})
    if capture.texts == 0:
        raise ValueError("there is no text: `batches` is empty")
    return capture.texts


class _Capture:
    """Captures activations and back-propagated gradients, and forms gradients from them."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sink: GradientSink,
        text_loss: TextLoss,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.sink = sink
        self.text_loss = text_loss
        self.texts = 0
        self.generic: set[str] = set()  # parameters whose gradient plain autograd forms
        self.owners = owners_of(model, parameters)
        self.rules: dict[nn.Module, Rule] = {}
        for module, names in self.owners.items():
            if rule := rule_of(module):
                self.rules[module] = rule
            else:
                self.generic.update(names.values())
        self._ticket = torch.zeros((), device=_device(parameters), requires_grad=True)
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._running: list[nn.Module] = []
        self._uses_watched = False
        self._in_forward = False
        self._rows = 0
        self._expected: Counter[str] = Counter()
        self._pending: defaultdict[str, list[Call]] = defaultdict(list)

    def __enter__(self) -> _Capture:
        self._hooks = [
            hook
            for module in self.rules
            for hook in (
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(self._after, with_kwargs=True),
            )
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def reduce(self, batch: Batch) -> None:
        """Hands the gradients of a batch to the sink."""
        rows = _rows(batch)
        if self.generic and rows > 1:
            for row in range(rows):
                self.reduce({key: value[row : row + 1] for key, value in batch.items()})
            return
        known = len(self.generic)
        losses = self._forward(batch, rows)
        if len(self.generic) > known:  # more was found that has no rule: begin this batch again
            self.reduce(batch)
            return
        self._check_losses(losses, rows)
        self.sink.begin(rows)
        self._backward(losses)
        self.texts += rows

    def _forward(self, batch: Batch, rows: int) -> Tensor:
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.generic)
        self._rows = rows
        self._expected.clear()
        self._pending.clear()
        self._running.clear()
        self._in_forward = True
        if self._uses_watched:
            losses = self.text_loss(self.model, batch)
        else:
            with OutsideUses(self.parameters, self.owners, self._running) as outside:
                losses = self.text_loss(self.model, batch)
            self.generic.update(outside.found)
            self._uses_watched = True
        self._in_forward = False
        return losses

    def _backward(self, losses: Tensor) -> None:
        generic = {name: p for name, p in self.parameters.items() if name in self.generic}
        kept = {name: parameter.grad for name, parameter in generic.items()}
        for parameter in generic.values():
            parameter.grad = None
        try:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            for name, parameter in generic.items():
                if parameter.grad is not None:
                    gradient = as_matrix(parameter.grad.to_dense())
                    self._pending[name] = [DenseCall(gradient.unsqueeze(0))]
        finally:
            for name, parameter in generic.items():
                parameter.grad = kept[name]
        for name in list(self._pending):
            self._reduce_parameter(name, self._pending.pop(name))

    def _check_losses(self, losses: Tensor, rows: int) -> None:
        if losses.shape != (rows,):
            raise ValueError(
                f"the loss must have one value per text, shape ({rows},), got {tuple(losses.shape)}"
            )
        if not losses.requires_grad:
            raise ValueError("the loss of the texts depends on no trainable parameter")
        if not bool(torch.isfinite(losses).all()):
            row = int((~torch.isfinite(losses)).nonzero()[0])
            raise ValueError(
                f"the loss of text {self.texts + row} (counted from 0 in the order of the "
                f"batches) is {losses[row].item()}"
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._running.append(module)
        ids = args[0] if args else None
        if not (isinstance(module, nn.Embedding) and isinstance(ids, Tensor) and ids.ndim > 1):
            return None
        if ids.shape[0] == 1:  # positions that all texts share
            return (ids.expand(self._rows, *ids.shape[1:]), *args[1:])
        return None

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._running.pop()
        names = {a: n for a, n in self.owners[module].items() if n not in self.generic}
        if not names:
            return None
        if kwargs or not all(self._is_per_text(tensor) for tensor in (*args, output)):
            self.generic.update(names.values())
            return None
        if self._in_forward:
            self._expected.update(names.values())
        if not torch.is_grad_enabled():  # the first run of a checkpointed layer
            return None
        if not output.requires_grad:  # nothing before this module trains
            output = output + self._ticket
        kept = [_Keep.apply(self._ticket, *args).grad_fn]  # type: ignore[no-untyped-call]

        def receive(backprop: Tensor) -> None:
            inputs = kept.pop().saved_tensors  # dropped at once, as autograd drops its own
            for attribute, call in self.rules[module](
                module, list(names), inputs, backprop
            ).items():
                self._take(names[attribute], call)

        output.register_hook(receive)
        return output

    def _is_per_text(self, tensor: Any) -> bool:
        """Whether the first axis counts texts; one without a token axis may count anything."""
        if not isinstance(tensor, Tensor):
            return False
        axes = 3 if tensor.is_floating_point() else 2
        return tensor.ndim >= axes and tensor.shape[0] == self._rows

    def _take(self, name: str, call: Call) -> None:
        """Reduces a parameter as soon as every call of its modules has been heard."""
        calls = self._pending[name]
        calls.append(call)
        if len(calls) == self._expected[name]:
            self._reduce_parameter(name, self._pending.pop(name))

    @torch.no_grad()
    def _reduce_parameter(self, name: str, calls: list[Call]) -> None:
        matrix = as_matrix(self.parameters[name])
        dtype = work_dtype(matrix)
        lookups = [call for call in calls if isinstance(call, EmbeddingCall)]
        with (
            torch.autocast(matrix.device.type, enabled=False),
            self.sink.parameter(name) as sink,
        ):
            if len(lookups) == len(calls):
                lookup = EmbeddingCall.joined(lookups) if len(lookups) > 1 else lookups[0]
                sink.take_touched(*lookup.touched(dtype))
                return
            for rows in row_slices(matrix, self._rows):
                block = self._block((self._rows, rows.stop - rows.start, matrix.shape[1]), dtype)
                for number, call in enumerate(calls):
                    call.write(block, rows.start, add=number > 0)
                sink.take_block(rows, block)

    def _block(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """Memory for a block, the same at every use."""
        elements = math.prod(shape)
        held = self._blocks.get(dtype)
        if held is None or held.numel() < elements:
            held = torch.empty(elements, dtype=dtype, device=self._ticket.device)
            self._blocks[dtype] = held
        return held[:elements].view(shape)


class _Keep(torch.autograd.Function):
    """Keeps tensors for the backward pass as autograd would, checkpointing included."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return ticket.view_as(ticket)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("unreachable: the ticket is no part of any loss")


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turns dropout off; afterwards every module has its own mode again."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not _drops_out(module):
            module.training = modes[module]  # or it would not checkpoint its activations
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _drops_out(module: nn.Module) -> bool:
    """Whether a module itself (not a child, which has its own mode) may apply dropout."""
    return any("drop" in name and value for name, value in vars(module).items())


def _check_labels(batch: Batch, number: int) -> None:
    if "labels" not in batch:
        return
    labelled = (batch["labels"][:, 1:] != IGNORE_INDEX).any(dim=1)
    if not bool(labelled.all()):
        row = int((~labelled).nonzero()[0])
        raise ValueError(
            f"batch {number}, row {row} (both counted from 0): the text has no label, so it has "
            "no loss and no gradient; leave it out, or label its answer"
        )


def _usable(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _device(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    return next(iter(parameters.values())).device
