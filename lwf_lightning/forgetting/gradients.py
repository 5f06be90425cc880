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
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from lwf_lightning.data.batch import IGNORE_INDEX, Batch
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.gradient_blocks import BlockWriter
from lwf_lightning.forgetting.gradient_sinks import GradientSink
from lwf_lightning.forgetting.module_calls import ModuleCalls
from lwf_lightning.forgetting.weights import required_parameters
from lwf_lightning.modes import gradient_mode
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import highest, mesh_of, ranks_of_shards, reshard, rounds, settle

TextLoss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> one loss per text, shape (texts,). The loss of text i may depend on row i of
the batch only.

It may take the texts one by one, in another order, or with other tokens: they are then run one at a
time, which is slower. This is seen in the ``input_ids`` that the model is called with. A loss that
calls parts of the model, or hands it ``inputs_embeds``, has to keep the texts in their order."""


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
        ValueError: If nothing trains, there is no text, a text has no label, or a loss is not of
            shape (texts,).
        NonFiniteLossError: If a loss is not finite; a ValueError, too.
    """
    parameters = required_parameters(model)
    batches = list(batches)
    if not batches:
        raise ValueError("there is no text: `batches` is empty")
    for number, batch in enumerate(batches):
        _check_labels(batch, number)
    ranks = ranks or ranks_of_shards(parameters.values())
    shared = list(rounds(batches, ranks, mesh_of(parameters.values()) is not None))
    torch.clear_autocast_cache()  # it may hold casts of weights that were exchanged since
    with (
        torch.enable_grad(),
        gradient_mode(model),
        _Engine(model, parameters, sink, text_loss) as engine,
    ):
        for batch, counts, most in tqdm(shared, desc=description, disable=not progress):
            batch = {key: _usable(value, engine.device) for key, value in batch.items()}
            engine.reduce(batch, counts, most)
    return engine.texts


class _Engine:
    """Runs batches and forms the gradients of their texts from what the modules' calls add."""

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
        self.text_loss = text_loss
        self.texts = 0
        self.device = next(iter(parameters.values())).device
        self.blocks = BlockWriter(parameters, sink)
        self.calls = ModuleCalls(model, parameters, self.blocks.write)
        self.generic = self.calls.generic
        self._heard: set[str] = set()

    def __enter__(self) -> _Engine:
        self.calls.__enter__()
        self._hooks = [
            module.register_forward_pre_hook(self._gathered)
            for module in self.model.modules()
            if isinstance(module, FSDPModule)
        ]
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.blocks.close()
        self.calls.__exit__()
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
            counts: Whether its texts count, or it is run for company.
            most: The most texts that any process that runs in step has.
        """
        rows = _rows(batch)
        most = rows if self.mesh is None else most
        if self.generic and most > 1:
            self._reduce_parts(batch, counts, most, 1)
            return
        known = len(self.generic)
        losses = self._forward(batch)
        finding = self._agreed(2 if len(self.generic) > known else int(self.calls.unsure))
        if finding == 2:  # more was found that has no rule: begin this batch again
            self._share_generic()
            self.reduce(batch, counts, most)
            return
        if finding and most > 1:  # with fewer texts no other axis is as long
            self._reduce_parts(batch, counts, most, math.ceil(most / 2))
            return
        self._check_losses(losses, rows)
        self.blocks.begin(rows, counts)
        self._backward(losses)
        self.texts += rows if counts else 0

    def _reduce_parts(self, batch: Batch, counts: bool, most: int, size: int) -> None:
        """The same, some texts at a time; a process that has no more goes on for company."""
        rows = _rows(batch)
        for start in range(0, most, size):
            first = min(start, rows - 1)
            part = {key: value[first : first + size] for key, value in batch.items()}
            self.reduce(part, counts and start < rows, size)

    def _agreed(self, finding: int) -> int:
        """The highest of what the processes found that run in step."""
        return finding if self.mesh is None else highest(finding, self.mesh)

    def _share_generic(self) -> None:
        """What one process found to have no rule, the others treat alike: their texts differ."""
        if self.mesh is not None:
            ranks = ranks_of_shards(self.parameters.values())
            self.generic.update(*ranks.gather(self.generic))

    def _forward(self, batch: Batch) -> Tensor:
        reshard(self.model)  # a layer takes over `requires_grad` when it is gathered anew
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.generic)
        with self.calls.forward(batch):
            return self.text_loss(self.model, batch)

    def _backward(self, losses: Tensor) -> None:
        generic = {name: p for name, p in self.parameters.items() if name in self.generic}
        kept = {name: parameter.grad for name, parameter in generic.items()}
        for parameter in generic.values():
            parameter.grad = None
        try:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self.calls.finish()
            for name, parameter in generic.items():
                if parameter.grad is not None:
                    self.blocks.write_dense(name, parameter.grad)
        finally:
            for name, parameter in generic.items():
                parameter.grad = kept[name]

    def _check_losses(self, losses: Tensor, rows: int) -> None:
        if losses.shape != (rows,):
            raise ValueError(
                f"the loss must have one value per text, shape ({rows},), got {tuple(losses.shape)}"
            )
        if not losses.requires_grad:
            raise ValueError("the loss of the texts depends on no trainable parameter")
        if not bool(torch.isfinite(losses).all()):
            row = int((~torch.isfinite(losses)).nonzero()[0])
            raise NonFiniteLossError(
                f"the loss of text {self.texts + row} (counted from 0 in the order of the "
                f"batches) is {losses[row].item()}"
            )

    def _gathered(self, module: nn.Module, _: Any) -> None:
        """Learns by which tensors a sharded layer computes, now that it is whole."""
        for part in module.modules():
            for attribute, name in self.calls.owners.get(part, {}).items():
                parameter = part.get_parameter(attribute)
                if isinstance(parameter, DTensor):  # of another layer
                    continue
                self.calls.uses.watch(name, parameter)
                if name in self.generic and name not in self._heard:
                    self._heard.add(name)
                    hear = partial(self._hear, name)
                    self._hooks.append(
                        cast(Any, parameter).register_post_accumulate_grad_hook(hear)
                    )

    def _hear(self, name: str, parameter: Tensor) -> None:
        """Takes the gradient of one text before FSDP2 adds those of other processes to it."""
        gradient = cast(Tensor, parameter.grad)
        parameter.grad = None
        self.blocks.write_dense(name, gradient)


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
