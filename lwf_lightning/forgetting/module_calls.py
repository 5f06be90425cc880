"""Hooks that hear what every call of a module adds to the gradients of its parameters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import Batch
from lwf_lightning.forgetting.gradient_rules import Call, Rule, VectorRule, rule_of
from lwf_lightning.forgetting.parameter_uses import OutsideUses, owners_of
from lwf_lightning.forgetting.row_order import is_in_order


class ModuleCalls:
    """Captures activations and back-propagated gradients of the modules that have a rule.

    Its hooks are on the modules from entering to leaving it.

    Args:
        model: The model.
        parameters: Its trainable parameters by name.
        reduce: Takes in all calls of a parameter, as soon as the backward pass has gone through
            the last of them: (name, calls).

    Attributes:
        owners: See :func:`~lwf_lightning.forgetting.parameter_uses.owners_of`.
        generic: Names of the parameters whose gradient plain autograd has to form. A forward pass
            adds what it finds.
        unsure: Whether the first axis of some tensor of the last forward pass may count something
            else than texts, of which there are as many, or texts in another order.
        uses: Watches the parameters in each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        reduce: Callable[[str, list[Call]], None],
    ) -> None:
        self.owners = owners_of(model, parameters)
        self.generic: set[str] = set()
        self.unsure = False
        self._model = model
        self._rules: dict[nn.Module, Rule] = {}
        for module, names in self.owners.items():
            if rule := rule_of(module):
                self._rules[module] = rule
            else:
                self.generic.update(names.values())
        self._running: list[Collection[str]] = []
        self.uses = OutsideUses(self._running, self.generic)
        self._parameters = parameters
        self._reduce = reduce
        device = next(iter(parameters.values())).device
        self._ticket = torch.zeros((), device=device, requires_grad=True)
        self._text_first: set[nn.Module] = set()  # modules whose first axis is known to be texts
        self._batch: Batch = {}
        self._rows = 0
        self._has_all = False  # whether the model was last called with all texts at once
        self._other_axes: set[int] = set()  # lengths of the batch's axes but the first
        self._in_forward = False
        self._expected: Counter[str] = Counter()
        self._pending: defaultdict[str, list[Call]] = defaultdict(list)

    def __enter__(self) -> ModuleCalls:
        # before the user's hooks, which may return another output
        self._hooks = [
            hook
            for module in self._rules
            for hook in (
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(self._after, with_kwargs=True, prepend=True),
            )
        ]
        self._hooks.append(
            self._model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[None]:
        """Captures the forward pass of a batch, and forgets the one before."""
        shapes = [tensor.shape for tensor in batch.values()]
        self._batch, self._rows = batch, shapes[0][0]
        self._has_all = False
        self._other_axes = {length for shape in shapes for length in shape[1:]}
        self.unsure = False
        self._expected.clear()
        self._pending.clear()
        self._running.clear()
        self._in_forward = True
        watched = {name: p for name, p in self._parameters.items() if name not in self.generic}
        with self.uses.watching(watched):
            yield
        self._in_forward = False

    def finish(self) -> None:
        """Hands over what is left after the backward pass: of calls that the loss needs in part."""
        for name in list(self._pending):
            self._reduce(name, self._pending.pop(name))

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor):
            self._has_all = False
            return
        self._has_all = ids.ndim > 1 and len(ids) == self._rows
        if self._has_all and self._rows > 1:
            self.unsure |= not is_in_order(ids, kwargs.get("attention_mask"), self._batch)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._running.append(self.owners[module].values())
        if isinstance(module, nn.Embedding) and args and self._are_shared_positions(args[0]):
            return (args[0].expand(self._rows, -1), *args[1:])
        return None

    def _are_shared_positions(self, ids: Any) -> bool:
        """Whether ids are the positions of all texts, and not the tokens of one that runs alone."""
        if not (self._has_all and isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == 1):
            return False
        return torch.equal(ids[0], torch.arange(ids.shape[1], dtype=ids.dtype, device=ids.device))

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
        if module not in self._text_first:
            if self._rows in self._other_axes.union(*(t.shape[1:-1] for t in (*args, output))):
                self.unsure = True
            else:
                self._text_first.add(module)
        if self._in_forward:
            self._expected.update(names.values())
        if not torch.is_grad_enabled():  # the first run of a checkpointed layer
            return None
        if not output.requires_grad:  # nothing before this module trains
            output = output + self._ticket
        elif output._is_view():  # it would lose its hook when it is changed in place
            output = torch.ops.aten._unsafe_view(output, output.shape)
        rule = self._rules[module]
        kept = [self._keep(*args)]
        if isinstance(rule, VectorRule) and rule.may_be_product:
            kept.append(self._keep(output.detach()))

        def receive(backprop: Tensor) -> None:
            inputs = kept[0].saved_tensors
            if isinstance(rule, VectorRule):
                inputs = (*inputs, _unless_changed(kept[1]) if kept[1:] else None)
            kept.clear()  # dropped at once, as autograd drops its own
            for attribute, call in rule(module, list(names), inputs, backprop).items():
                self._take(names[attribute], call)

        output.register_hook(receive)
        return output

    def _is_per_text(self, tensor: Any) -> bool:
        """Whether the first axis may count texts; one without a token axis may count anything."""
        if not isinstance(tensor, Tensor):
            return False
        axes = 3 if tensor.is_floating_point() else 2
        return tensor.ndim >= axes and tensor.shape[0] == self._rows

    def _keep(self, *tensors: Tensor) -> Any:
        return _Keep.apply(self._ticket, *tensors).grad_fn  # type: ignore[no-untyped-call]

    def _take(self, name: str, call: Call) -> None:
        calls = self._pending[name]
        calls.append(call)
        if len(calls) == self._expected[name]:
            self._reduce(name, self._pending.pop(name))


class _Keep(torch.autograd.Function):
    """Keeps tensors for the backward pass as autograd would, checkpointing included."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return ticket.view_as(ticket)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("unreachable: the ticket is no part of any loss")


def _unless_changed(kept: Any) -> Tensor | None:
    """The one tensor that was kept; None if it was changed in place since."""
    try:
        (tensor,) = kept.saved_tensors
    except RuntimeError:  # by which autograd says so
        return None
    return tensor  # type: ignore[no-any-return]
