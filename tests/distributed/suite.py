"""What two ranks do together. Run through torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.skipif("RANK" not in os.environ, reason="run with torchrun")
Make = Callable[..., Any]


def test_equals_one_process(results_of: Make, shared_folder: Path) -> None:
    expected = torch.load(shared_folder / "one_process.pt", weights_only=True)
    for name, one in expected.items():
        compare(results_of(name, int(os.environ["WORLD_SIZE"])), one)


def compare(two: dict[str, Any], one: dict[str, Any]) -> None:
    """Discrete results are equal; sums differ in the order of their terms."""
    for key in ("texts", "forget_set", "counts"):
        assert two[key] == one[key], key
    # Rounding shows in an anchor as in any weights after AdamW, and from there in what follows.
    close(two["anchor"], one["anchor"], 1e-5)
    close(two["fisher"], one["fisher"], 1e-5)
    close(two["scores"], one["scores"], 1e-5)
    assert len(one["weights"]) == 21
    close(two["weights"], one["weights"], 1e-5)
    close(two["metrics"], one["metrics"], 1e-5)
    # What one rank holds, all hold, to the last bit.
    first = from_first(two)
    assert two["texts"] == first["texts"]
    for key in ("forget_set", "fisher", "anchor", "scores", "weights", "counts", "metrics"):
        close(two[key], first[key], 0.0)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def from_first(value: Any) -> Any:
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]
