"""The table of figures after ``validate`` and ``test``."""

from __future__ import annotations

import pytest

from lwf_lightning.results_table import print_results


def test_a_figure_of_each_loader_has_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"test/accuracy": 0.5}
    print_results(
        [shared | {"my/x/dataloader_idx_0": 0.25}, shared | {"my/x/dataloader_idx_1": 0.75}], "test"
    )
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "/" in line]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ("my/x/dataloader_idx_0", "0.2500"),
        ("my/x/dataloader_idx_1", "0.7500"),
        ("test/accuracy", "0.5000"),
    ]
