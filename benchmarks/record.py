"""Where and when a benchmark ran, its file of results, and the table that is made of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from lwf_lightning.files import whole_file

RESULTS = Path(__file__).parent / "results.json"
MARKS = ("<!-- figures: begin -->\n", "<!-- figures: end -->\n")
"""Around what :func:`refresh` writes into a document."""
COLUMNS = ("benchmark", "work", "compared with", "figure", "bar", "")
_PACKAGES = (
    *("torch", "lightning", "transformers", "peft", "trl", "opacus"),
    "lwf-lightning",
)


def surroundings() -> dict[str, Any]:
    """What figures depend on beside the code: the machine and the versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(memory / 1e9, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version(), **dict(_versions())},
    }


def _versions() -> Iterator[tuple[str, str | None]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """The commit checked out here, with ``+`` if files of it were changed; None outside git."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        # The files of results themselves change while they are made.
        made = (":!results.json", ":!growth.jsonl", ":!../docs/figures")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", ":/", *made)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def read(path: Path) -> dict[str, Any]:
    """The results of earlier runs with the same machine and versions; else none."""
    here = surroundings()
    if path.exists() and all(load(path).get(key) == value for key, value in here.items()):
        return load(path)
    return {**here, "benchmarks": {}}


def put_aside(path: Path) -> Path | None:
    """Moves results that :func:`read` would not take out of the way; where to, if there are any."""
    if not path.exists() or read(path)["benchmarks"] or not load(path).get("benchmarks"):
        return None
    return path.replace(path.with_suffix(".old.json"))


def has_figures(entry: Mapping[str, Any]) -> bool:
    """Whether a benchmark ran to its end and measured something."""
    results = entry["results"]
    return any("figure" in r for r in results) and not any("failed" in r for r in results)


def newest(known: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry to keep: a run without figures stands beside the last that had some."""
    if known is None or has_figures(entry) or not has_figures(known):
        return entry
    return {**known, "tried_since": entry}


def load(path: Path) -> dict[str, Any]:
    """The results of earlier runs, wherever they were made."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def lines(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    """One line per result, a text for each of :data:`COLUMNS`."""
    return [
        (name, *_cells(result))
        for name, benchmark in benchmarks.items()
        for result in benchmark["results"]
    ]


def _cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    for kind in ("skipped", "failed"):
        if kind in result:
            return (result["work"], result["compared_with"], "", "", f"{kind}: {result[kind]}")
    bar = result["bar"]
    return (
        result["work"],
        result["compared_with"],
        _number(result["figure"], result["unit"]),
        "" if bar is None else f"{result['better']} {_number(bar, result['unit'])}",
        {True: "met", False: "missed", None: ""}[result["met"]],
    )


def _number(value: float, unit: str) -> str:
    text = f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return f"{text} {unit}"


def rich_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """The table for a terminal, narrow enough for 80 columns: a part per benchmark."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("work: compared with", ratio=1)
    for column in COLUMNS[3:5]:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(COLUMNS[5])
    for benchmark, own in groupby(rows, key=itemgetter(0)):
        table.add_section()
        table.add_row(benchmark, style="bold")
        for _, work, beside, *cells in own:
            style = None if cells[-1] in ("met", "") else "yellow"
            table.add_row(f"{work}: {beside}" if beside else work, *cells, style=style)
    return table


def refresh(document: Path, found: Mapping[str, Any]) -> None:
    """Writes every figure that has a bar, and where it comes from, between a document's marks.

    Raises:
        ValueError: If the document lacks a mark.
    """
    text = document.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{document} must hold {MARKS[0].strip()} and {MARKS[1].strip()} once")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    benchmarks, machine = found["benchmarks"], found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    made = {pair for run in benchmarks.values() for pair in _measured(run)}
    runs = {f"{commit} with {threads} threads" for commit, threads in made}
    source = (
        f"Commit {', '.join(sorted(runs))}; {machine['cpu']}, {machine['cores']} cores; "
        f"{versions.replace(' None', ' not installed')}.\n"
    )
    table = markdown_table([row for row in lines(benchmarks) if row[-1]])
    with whole_file(document) as temporary:
        content = [before, MARKS[0], source, "\n", table, "\n", MARKS[1], after]
        temporary.write_text("".join(content), encoding="utf-8")


def _measured(run: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Commits and threads that measured its figures; a benchmark may keep earlier points."""
    kept = [result.get("details", {}).get("measured_by", ()) for result in run["results"]]
    return {tuple(pair) for pairs in kept for pair in pairs} or {(run["commit"], run["threads"])}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    return "\n".join(markdown_rows([COLUMNS, ["---"] * len(COLUMNS), *rows]))


def markdown_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, from its heading and its rule on."""
    return ["| " + " | ".join(row) + " |" for row in rows]
