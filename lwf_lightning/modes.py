"""The training or evaluation mode of every module of a model, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Yields whether each module is in training mode; afterwards each is again as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield modes
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def gradient_mode(model: nn.Module) -> Iterator[None]:
    """Turns dropout off; afterwards every module has its own mode again."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    with kept_modes(model) as modes:
        model.eval()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and not _drops_out(module):
                module.training = modes[module]  # or it would not checkpoint its activations
        yield


def _drops_out(module: nn.Module) -> bool:
    """Whether a module itself (not a child, which has its own mode) may apply dropout.

    By an attribute of its own, or of its configuration, which Falcon's layers read it from.
    """
    settings = vars(module) | getattr(getattr(module, "config", None), "__dict__", {})
    return any("drop" in name and value for name, value in settings.items())
