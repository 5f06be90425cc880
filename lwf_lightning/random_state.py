"""The state of all random generators that a step may draw from, for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of PyTorch's generators of the CPU and its GPU, of ``random`` and of NumPy.

    Nothing here draws from the last two, but a model or a collate function of yours may.

    Args:
        device: Where the model is.

    Returns:
        Tensors and primitives only.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what :func:`random_state` gave; another kind of device starts with its own."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "python" in state:  # a checkpoint of an earlier version has only PyTorch's
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
