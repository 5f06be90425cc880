"""Which modules own the trainable parameters, and whether something else uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Owners: TypeAlias = dict[nn.Module, dict[str, str]]
"""A module with trainable parameters of its own -> attribute -> name of the parameter."""


def owners_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Owners:
    """Finds the modules that own parameters; a tied parameter has several owners, one name.

    Args:
        model: The model.
        parameters: Its trainable parameters by name.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners: Owners = {}
    for module in model.modules():
        own = {
            attribute: names[id(parameter)]
            for attribute, parameter in module.named_parameters(
                recurse=False, remove_duplicate=False
            )
            if id(parameter) in names
        }
        if own:
            owners[module] = own
    return owners


class OutsideUses(TorchFunctionMode):
    """Finds parameters that are used outside their own module, where no hook would see it.

    Args:
        names: The name of each parameter to watch, by its ``id``.
        owners: See :func:`owners_of`.
        running: The modules that are being run, innermost last; kept up to date by the caller.

    Attributes:
        found: Names of the parameters used elsewhere.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        owners: Owners,
        running: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names = names
        self._owners = owners
        self._running = running

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Looks at the arguments of every operation that returns a tensor."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for argument in (*args, *(kwargs or {}).values()):
                for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                    name = self._names.get(id(tensor))
                    if name is not None and not self._is_running(name):
                        self.found.add(name)
        return result

    def _is_running(self, name: str) -> bool:
        return bool(self._running) and name in self._owners[self._running[-1]].values()
