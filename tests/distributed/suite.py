"""What two ranks do together, with all weights or half of them each. Run through torchrun."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

pytestmark = pytest.mark.skipif("RANK" not in os.environ, reason="run with torchrun")
Make = Callable[..., Any]
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


@pytest.fixture(params=["ddp", "fsdp2"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_equals_one_process(results_of: Make, runs: list[str], shared_folder: Path) -> None:
    expected = torch.load(shared_folder / "one_process.pt", weights_only=True)
    for name in runs:
        one = expected[name]
        tolerance = 1e-6 if one["fisher"]["model.norm.weight"].dtype == torch.float32 else 1e-12
        compare(results_of(name, WORLD_SIZE), one, tolerance, name)


def compare(two: dict[str, Any], one: dict[str, Any], tolerance: float, name: str) -> None:
    """Discrete results are equal; sums differ in the order of their terms."""
    for key in ("texts", "forget_set", "counts"):
        assert two[key] == one[key], key
    actions = [[(r["step"], r["action"], r["signal"]) for r in run["guard"]] for run in (two, one)]
    assert actions[0] == actions[1], name
    for key in ("anchor", "fisher", "scores", "weights"):
        close(two[key], one[key], tolerance, f"{name}: {key}")
    close(two["metrics"], one["metrics"], 1e-6, "metrics")  # logged in float32
    assert len(one["weights"]) == 13
    # What one rank holds, all hold, to the last bit.
    first = from_first(two)
    assert two["texts"] == first["texts"]
    assert two["guard"] == first["guard"]
    for key in ("forget_set", "fisher", "anchor", "scores", "weights", "counts", "metrics"):
        close(two[key], first[key], 0.0, key)


def test_files_are_those_of_one_process(
    write_files: Make, shared_folder: Path, strategy: str
) -> None:
    one, two = shared_folder / "one", shared_folder / strategy
    write_files(WORLD_SIZE, two)
    distributed.barrier()
    assert (two / "elicit.jsonl").read_bytes() == (one / "elicit.jsonl").read_bytes()
    for row, expected in zip(rows(two / "score.jsonl"), rows(one / "score.jsonl"), strict=True):
        assert list(row) == list(expected)
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value) if isinstance(value, float) else value)
    weights = [load_file(folder / "exported" / "model.safetensors") for folder in (two, one)]
    close(*weights, 1e-12, "exported")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def close(actual: Any, expected: Any, tolerance: float, where: str) -> None:
    """Whether all numbers differ by no more than a share of their tensor's largest."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key, value in expected.items():
            close(actual[key], value, tolerance, f"{where}: {key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for number, value in enumerate(expected):
            close(actual[number], value, tolerance, f"{where}: {number}")
    else:
        actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance * largest, msg=lambda text: f"{where}: {text}"
        )


def from_first(value: Any) -> Any:
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]
