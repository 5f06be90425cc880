from __future__ import annotations

import io
import random

import numpy as np
import torch

from lwf_lightning.random_state import random_state, restore_random_state


def draw() -> list[float]:
    return [random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]


def test_all_generators_go_on_where_they_were_and_the_state_holds_primitives_only() -> None:
    draw()  # random and NumPy now keep the second of two Gaussian numbers back
    file = io.BytesIO()
    torch.save(random_state(torch.device("cpu")), file)
    expected = [draw() for _ in range(3)]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    file.seek(0)
    restore_random_state(torch.load(file, weights_only=True), torch.device("cpu"))
    assert [draw() for _ in range(3)] == expected


def test_a_state_of_pytorch_alone_is_taken_too() -> None:
    state = {"cpu": torch.get_rng_state()}
    expected = torch.randn(3)
    restore_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)
