"""All benchmarks, one table: ``python -m benchmarks`` (or ``make bench``).

    python -m benchmarks                    # all of them: two quiet cores take 90 minutes
    python -m benchmarks --only scoring     # one of them; the others keep their last results
    python -m benchmarks --resume           # what has not finished at this commit
    python -m benchmarks --quick            # does everything still run? the figures mean nothing
    python -m benchmarks --markdown         # the table of the last results, without a run
    python -m benchmarks --markdown docs/performance.md     # the same, into the document

``benchmarks/results.json`` is written after each benchmark: machine, versions, commit, threads and
every figure with what it was made of. One that fails, or finds no figure, leaves its last results
as they are and says so beside them; results of another machine or of other versions move to
``results.old.json``.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import record
from benchmarks.harness import NotHere, Result, Skipped


def find_benchmarks() -> dict[str, ModuleType]:
    """The modules of this folder that offer ``results``, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {
        name: import_module(f"benchmarks.{name}") for name in names if not name.startswith("_")
    }
    return {name: module for name, module in modules.items() if hasattr(module, "results")}


def run(module: ModuleType, *, quick: bool) -> Iterator[dict[str, Any]]:
    """The results of one benchmark; what cannot run becomes a line that says why."""
    name = module.__name__.rpartition(".")[2]
    try:
        if not quick:
            found: Iterator[Result | Skipped] = module.results()
        elif "quick" in inspect.signature(module.results).parameters:
            found = module.results(quick=True)
        else:
            found = iter([Skipped(name, "", "it has no quick version")])
        for result in found:
            yield result.as_json()
    except NotHere as error:
        yield Skipped(name, "", str(error)).as_json()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("lwf_lightning", "benchmarks"):
            raise
        yield Skipped(name, "", f"the package {error.name} is not installed").as_json()
    except Exception as error:  # the other benchmarks go on, and the exit status tells
        failed = f"{type(error).__name__}: {error}"
        yield {"work": name, "compared_with": "", "failed": " ".join(failed.split())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for, prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks only")
    parser.add_argument("--quick", action="store_true", help="a smoke test; nothing is kept")
    parser.add_argument("--resume", action="store_true", help="leave out what is done already")
    parser.add_argument(
        "--markdown",
        nargs="?",
        const=False,
        type=Path,
        metavar="FILE",
        help="print the last results only, or write those with a bar between the marks of FILE",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    if options.markdown is not None:
        last = record.load(options.output)
        if options.markdown:
            record.refresh(options.markdown, last)
        else:
            print(record.markdown_table(record.lines(last["benchmarks"])))
        return 0
    benchmarks = find_benchmarks()
    if unknown := sorted(set(options.only or ()) - benchmarks.keys()):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(benchmarks)}")
    torch.set_num_threads(options.threads)
    console, commit = Console(), record.commit()
    kept = record.read(options.output)
    ran: dict[str, Any] = {}
    names = options.only or list(benchmarks)
    text = TextColumn("{task.description}")
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(names))
        for name in names:
            progress.update(bar, description=name)
            known = kept["benchmarks"].get(name)
            if options.resume and not options.quick and _is_done(known, commit, options.threads):
                ran[name] = known
                console.print(f"{name}: done before at this commit")
                progress.advance(bar)
                continue
            start, found = time.perf_counter(), []
            for result in run(benchmarks[name], quick=options.quick):
                found.append(result)
                progress.update(bar, description=f"{name}, the last: {result['work']}")
            ran[name] = {
                "commit": commit,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "threads": options.threads,
                "seconds": round(time.perf_counter() - start, 1),
                "results": found,
            }
            console.print(f"{name}: {ran[name]['seconds']:.0f} s")
            progress.advance(bar)
            if not options.quick:
                kept["benchmarks"][name] = record.newest(known, ran[name])
                if moved := record.put_aside(options.output):
                    console.print(f"Results of another machine or other versions: now {moved}")
                record.write(options.output, kept)
    title = f"{options.threads} threads, commit {commit}" + (
        ", quick: the figures mean nothing" if options.quick else ""
    )
    console.print(record.rich_table(record.lines(ran), title))
    return int(any("failed" in result for entry in ran.values() for result in entry["results"]))


def _is_done(known: dict[str, Any] | None, commit: str | None, threads: int) -> bool:
    """Whether an earlier run measured the same code in the same way, to its end."""
    if known is None or commit is None or commit.endswith("+"):
        return False
    is_same = known["commit"] == commit and known["threads"] == threads
    return is_same and "tried_since" not in known and record.has_figures(known)


if __name__ == "__main__":
    sys.exit(main())
