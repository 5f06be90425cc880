"""The reading of a run's own memory."""

from __future__ import annotations

import sys

import pytest
import torch

from lwf_lightning.study.perform import forget_peak_memory, peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_peak_begins_anew() -> None:
    large = torch.ones(50_000_000)  # 200 MB
    high = peak_memory()
    del large
    forget_peak_memory()
    assert peak_memory() < high - 150e6
