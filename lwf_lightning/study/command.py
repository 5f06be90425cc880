"""``python cli.py study``: performs what is missing of a study, then reports."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    track,
)

from lwf_lightning.cli_errors import clear_errors
from lwf_lightning.files import whole_file
from lwf_lightning.study.config import Study
from lwf_lightning.study.data_files import told_of_changed
from lwf_lightning.study.figures import draw_all
from lwf_lightning.study.file import StudyParser
from lwf_lightning.study.kept import kept
from lwf_lightning.study.matrix import (
    Record,
    Run,
    asked_for,
    awaited_runs,
    runs_of,
    tuning_in_words,
)
from lwf_lightning.study.missing import missing_runs, what_diverged, what_is_missing
from lwf_lightning.study.page import write_page
from lwf_lightning.study.planted import told_of_unknown, with_found_figures
from lwf_lightning.study.pooled import pool
from lwf_lightning.study.results import read_records
from lwf_lightning.study.summary import summarize
from lwf_lightning.study.tables import markdown
from lwf_lightning.study.validated import (
    Validated,
    by_configuration,
    check_validations,
    told_of_untrained,
)
from lwf_lightning.study.workers import (
    check_counts,
    limit_threads,
    perform_all,
    perform_once,
    results_file,
)

_IN_WORDS = {
    "diverged": "diverged: recorded, and not done again",
    "recorded": "recorded by another process meanwhile",
    "taken": "taken: another process is at them now; start the study again when it has ended",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the subcommand.

    Args:
        arguments: Arguments instead of those of the command line, without ``study``.
    """
    parser = StudyParser(
        prog="cli.py study",
        description="Compare methods over tasks and seeds: performs the runs that have no result "
        "yet, then writes results.jsonl, tables, figures and one HTML page.",
    )
    parser.add_argument("--config", action="config", help="YAML file of the study")
    parser.add_class_arguments(Study, as_group=False)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--list", action="store_true", help="list the missing runs and stop")
    parser.add_argument("--only", help="perform this one run, by its name in --list, and stop")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check every run's configuration, estimate hours and memory, and stop",
    )
    parser.add_argument(
        "--flops", type=float, help="operations per second that --check assumes, by default 1e14"
    )
    parser.add_argument(
        "--data_dir", help="folder of the tasks' files that --check counts, instead of the study's"
    )
    parser.add_argument("--report", action="store_true", help="report on what is there and stop")
    options = parser.parse_args(arguments)
    with clear_errors():
        given = parser.instantiate_classes(options)
        try:
            _act(Study(**{name: given[name] for name in Study.__dataclass_fields__}), options)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: the same command goes on where it was\n")
            raise SystemExit(128 + signal.SIGINT) from None


def _act(study: Study, options: Any) -> None:
    console = Console(markup=False, emoji=False)  # names may hold brackets, and colons
    check_counts(options.workers, options.threads)
    for flag in ("flops", "data_dir"):
        if not options.check and getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is of --check alone: add it, or leave --{flag} out")
    ends = [f"--{flag}" for flag in ("list", "only", "check", "report") if getattr(options, flag)]
    if len(ends) > 1:
        raise ValueError(f"{' and '.join(ends)}: each does one thing and stops: give one of them")
    if options.only:
        limit_threads(options.threads)
        _perform_named(study, options.only, console)
        return
    if options.list:
        for run in missing_runs(study):
            console.print(f"{run.identity}  {run.stage}  {', '.join(run.cells)}", soft_wrap=True)
        # The list alone is what a launcher reads.
        _tell_awaited(study, Console(stderr=True, markup=False, emoji=False))
        return
    if options.check:
        _check(study, 1e14 if options.flops is None else options.flops, options.data_dir, console)
        return
    failed = 0
    if not options.report:
        _tell(check_validations(by_configuration(missing_runs(study))), console)
        failed = _perform_missing(study, options.workers, options.threads, console)
    report(study, console)
    if failed:
        raise SystemExit(1)


def report(study: Study, console: Console) -> None:
    """Writes tables, figures and page from the study's records, and says where they are."""
    recorded = read_records(results_file(study))
    records = with_found_figures(study, asked_for(study, recorded))
    if others := len(recorded) - len(records):
        console.print(f"{others} records that the study no longer asks for are left out.")
    notes = [told_of_untrained(study, records), told_of_unknown(study, records)]
    _tell([*chain(*notes), *told_of_changed(records), *what_diverged(records)], console)
    lines, pooled, of_runs = summarize(study, records), pool(study, records), kept(study, records)
    missing = what_is_missing(study, recorded)
    nothing = [] if lines else [_why_nothing(study, records)]
    if not lines and not of_runs:
        console.print("\n".join([*missing, *nothing]), soft_wrap=True)
        return
    head = [*tuning_in_words(study), *(f"Not there yet: {line}" for line in missing), *nothing]
    table = markdown(study, lines, pooled, of_runs, head)
    with whole_file(study.folder / "results.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    pictures = draw_all(study, lines, pooled, of_runs, records)
    page = study.folder / "index.html"
    write_page(study, lines, pooled, of_runs, records, missing, pictures, page)
    console.print(table, soft_wrap=True)
    console.print(f"Page: {page}", soft_wrap=True)


def _why_nothing(study: Study, records: Iterable[Record]) -> str:
    if all(record["stage"] != "comparison" for record in records):
        return "Nothing to compare yet: no run of the comparison is recorded."
    return f"Nothing to compare yet: no run of the baseline, {study.baseline}, is recorded." + (
        " It has those of the way that validation picks, once all trials of its ways are."
        if study.baseline in study.best_of
        else ""
    )


def _perform_missing(study: Study, workers: int, threads: int, console: Console) -> int:
    """Performs what is missing, tells what came of it, and returns how many runs failed."""
    outcomes: Counter[str] = Counter()
    attempted: set[str] = set()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        while runs := [run for run in missing_runs(study) if run.identity not in attempted]:
            stage = runs[0].stage
            now = [run for run in runs if run.stage == stage]
            attempted.update(run.identity for run in now)
            bar = progress.add_task(f"{study.name}: {stage}", total=len(now))

            def told(run: Run, outcome: str, bar: Any = bar) -> None:
                outcomes[outcome.split(":", 1)[0]] += 1
                if outcome.startswith("failed"):
                    progress.console.print(f"{run.identity}: {outcome}", soft_wrap=True)
                progress.advance(bar)

            perform_all(study, now, workers=workers, threads=threads, told=told)
    if outcomes:
        told_of = (f"{count} {_IN_WORDS.get(name, name)}" for name, count in outcomes.items())
        console.print(", ".join(told_of), soft_wrap=True)
    return outcomes["failed"]


def _check(study: Study, flops: float, data_dir: str | None, console: Console) -> None:
    from lwf_lightning.study.check import check, summary, table  # imports the command line

    if not flops > 0:
        raise ValueError(f"--flops must be above 0, got {flops}")
    runs = missing_runs(study)
    if not runs:
        raise ValueError("--check: every run of this study is recorded already")
    checked = list(track(check(study, runs, data_dir), "Checking", len(runs), console=console))
    lengths = (Validated(c.run, c.expected.steps, c.expected.validated) for c in checked)
    _tell(check_validations(lengths), console)
    _tell([*table(study, checked, flops), "", *summary(checked, flops)], console)
    _tell_awaited(study, console)


def _tell(lines: Iterable[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _tell_awaited(study: Study, console: Console) -> None:
    if count := awaited_runs(study, read_records(results_file(study))):
        console.print(
            f"After tuning {count} more will be compared, with the settings that it chooses.",
            highlight=False,
            soft_wrap=True,
        )


def _perform_named(study: Study, name: str, console: Console) -> None:
    for run in missing_runs(study):
        if run.identity == name:
            _tell(check_validations(by_configuration([run])), console)
            outcome = perform_once(study, run)
            console.print(_IN_WORDS.get(outcome, outcome), soft_wrap=True)
            if outcome.startswith("failed"):
                raise SystemExit(1)
            return
    by_run = {record["run"]: record for record in read_records(results_file(study))}
    if name not in (run.identity for run in runs_of(study, by_run)):
        raise ValueError(f"--only: no run of this study is named {name}; see --list")
    console.print(f"{name} is recorded already", soft_wrap=True)
