"""The table that ``validate`` and ``test`` end with: one column, whole names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(results: Sequence[Mapping[str, Any]], stage: str) -> None:
    """Prints each figure once, where Lightning has a column for each of several loaders.

    Args:
        results: What was logged, a mapping per loader; ours hold the figures of all tasks alike.
        stage: ``validate`` or ``test``.
    """
    figures = {name: value for own in results for name, value in own.items()}
    table = Table()
    table.add_column(stage, no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for name in sorted(figures):
        table.add_row(name, f"{float(figures[name]):.4f}")
    if figures:
        Console().print(table)
