"""The mode in which gradients of texts are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gradient_mode(model: nn.Module) -> Iterator[None]:
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
