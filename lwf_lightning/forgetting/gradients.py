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
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from lwf_lightning.data.batch import IGNORE_INDEX, Batch
from lwf_lightning.forgetting.gradient_rules import (
    Call,
    DenseCall,
    EmbeddingCall,
    Rule,
    VectorRule,
    rule_of,
    work_dtype,
)
from lwf_lightning.forgetting.gradient_sinks import (
    GradientSink,
    as_matrix,
    matrix_shape,
    row_slices,
)
from lwf_lightning.forgetting.modes import gradient_mode
from lwf_lightning.forgetting.parameter_uses import OutsideUses, owners_of
from lwf_lightning.forgetting.weights import trainable_parameters
from lwf_lightning.forgetting.workers import Workers
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import highest, mesh_of, ranks_of_shards, reshard, rounds, settle

TextLoss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> one loss per text, shape (texts,). The loss of text i may depend on row i of
the batch only."""


def reduce_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    sink: GradientSink,
    *,
    text_loss: TextLoss,
    description: str,
    progress: bool = False,
    ranks: Ranks | None = None,
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
        ranks: The processes that share the batches; each is given all of them. By default those
            among which the model is sharded, or this one alone.

    Returns:
        How many texts this process has handed over.

    Raises:
        ValueError: If nothing trains, there is no text, a text has no label, or a loss is not
            finite or not of shape (texts,).
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter: all of them are frozen")
    batches = list(batches)
    if not batches:
        raise ValueError("there is no text: `batches` is empty")
    for number, batch in enumerate(batches):
        _check_labels(batch, number)
    device = next(iter(parameters.values())).device
    ranks = ranks or ranks_of_shards(parameters.values())
    shared = list(rounds(batches, ranks, mesh_of(parameters.values()) is not None))
    torch.clear_autocast_cache()  # it may hold casts of weights that were exchanged since
    with (
        torch.enable_grad(),
        gradient_mode(model),
        _Capture(model, parameters, sink, text_loss) as capture,
    ):
        for batch, counts, most in tqdm(shared, desc=description, disable=not progress):
            batch = {key: _usable(value, device) for key, value in batch.items()}
            capture.reduce(batch, counts, most)
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
        self.mesh = mesh_of(parameters.values())
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
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._ticket = torch.zeros((), device=_device(parameters), requires_grad=True)
        self._blocks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._workers = Workers(self._ticket.device)
        self._running: list[nn.Module] = []
        self._uses_watched = False
        self._in_forward = False
        self._rows = 0
        self._counts = True
        self._heard: set[str] = set()
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
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                self._hooks.append(module.register_forward_pre_hook(self._gathered))
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._workers.close()
        for hook in self._hooks:
            hook.remove()
        reshard(self.model)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        if error is None:  # else other processes may not take part
            settle(self.model)

    def reduce(self, batch: Batch, counts: bool, most: int) -> None:
        """Hands the gradients of a batch to the sink.

        Args:
            batch: The batch.
            counts: Whether its texts count; if not, the sink is asked for what a parameter needs,
                and gets nothing.
            most: The most texts that any process that runs in step has.
        """
        rows = _rows(batch)
        if self.generic and most > 1:
            for row in range(rows if self.mesh is None else most):
                one = min(row, rows - 1)
                part = {key: value[one : one + 1] for key, value in batch.items()}
                self.reduce(part, counts and row < rows, 1)
            return
        known = len(self.generic)
        losses = self._forward(batch, rows)
        if self.mesh is not None and highest(len(self.generic), self.mesh) > known:
            self._share_generic()
        if len(self.generic) > known:  # more was found that has no rule: begin this batch again
            self.reduce(batch, counts, most)
            return
        self._check_losses(losses, rows)
        self._counts = counts
        self.sink.begin(rows if counts else 0)
        self._backward(losses)
        self.texts += rows if counts else 0

    def _share_generic(self) -> None:
        """What one process found to have no rule, the others treat alike: their texts differ."""
        self.generic.update(*ranks_of_shards(self.parameters.values()).gather(self.generic))

    def _forward(self, batch: Batch, rows: int) -> Tensor:
        reshard(self.model)  # a layer takes over `requires_grad` when it is gathered anew
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
            with OutsideUses(self._names, self.owners, self._running) as outside:
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

    def _gathered(self, module: nn.Module, _: Any) -> None:
        """Learns by which tensors a sharded layer computes, now that it is whole."""
        for part in module.modules():
            for attribute, name in self.owners.get(part, {}).items():
                parameter = part.get_parameter(attribute)
                if isinstance(parameter, DTensor):  # of another layer
                    continue
                self._names[id(parameter)] = name
                if name in self.generic and name not in self._heard:
                    self._heard.add(name)
                    hear = partial(self._hear, name)
                    self._hooks.append(
                        cast(Any, parameter).register_post_accumulate_grad_hook(hear)
                    )

    def _hear(self, name: str, parameter: Tensor) -> None:
        """Takes the gradient of one text before FSDP2 adds those of other processes to it."""
        gradient = cast(Tensor, parameter.grad).to_dense()
        parameter.grad = None
        self._reduce_parameter(name, [DenseCall(as_matrix(gradient).unsqueeze(0))])

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
        rule = self.rules[module]
        wanted = (*args, output.detach()) if isinstance(rule, VectorRule) else args
        kept = [_Keep.apply(self._ticket, *wanted).grad_fn]  # type: ignore[no-untyped-call]

        def receive(backprop: Tensor) -> None:
            inputs = kept.pop().saved_tensors  # dropped at once, as autograd drops its own
            for attribute, call in rule(module, list(names), inputs, backprop).items():
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
        parameter = self.parameters[name]
        dtype, columns = work_dtype(parameter), matrix_shape(parameter)[1]
        lookups = [call for call in calls if isinstance(call, EmbeddingCall)]
        with (
            torch.autocast(parameter.device.type, enabled=False),
            self.sink.parameter(name) as sink,
        ):
            if not self._counts:
                return
            if len(lookups) == len(calls):
                lookup = EmbeddingCall.joined(lookups) if len(lookups) > 1 else lookups[0]
                sink.take_touched(*lookup.touched(dtype))
                return
            for call in calls:
                call.prepare(dtype)

            def reduce(worker: int, rows: slice) -> None:
                block = self._block(worker, (self._rows, rows.stop - rows.start, columns), dtype)
                for number, call in enumerate(calls):
                    call.write(block, rows.start, add=number > 0)
                sink.take_block(rows, block)

            self._workers.run(reduce, row_slices(parameter, self._rows, self._workers.count))

    def _block(self, worker: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A worker's memory for a block, the same at every use."""
        elements = math.prod(shape)
        held = self._blocks.get((worker, dtype))
        if held is None or held.numel() < elements:
            held = torch.empty(elements, dtype=dtype, device=self._ticket.device)
            self._blocks[worker, dtype] = held
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
