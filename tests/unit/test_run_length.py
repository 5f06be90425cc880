from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lwf_lightning.run_length import learning_steps


@pytest.mark.parametrize(
    ("max_epochs", "loader", "estimate", "expected"),
    [
        (-1, None, 8, 8),
        (-1, None, float("inf"), None),  # no limit
        (2, object(), 12, 12),
        (2, object(), -1, None),  # a loader without a length
        (2, None, 12, None),  # asking would load it
    ],
)
def test_a_length_that_nobody_knows_is_none(
    max_epochs: int, loader: Any, estimate: float, expected: int | None
) -> None:
    trainer: Any = SimpleNamespace(
        max_epochs=max_epochs, train_dataloader=loader, estimated_stepping_batches=estimate
    )
    assert learning_steps(trainer) == expected
