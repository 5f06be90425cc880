"""The results of a study as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from lwf_lightning.files import whole_file
from lwf_lightning.study.config import Study
from lwf_lightning.study.figures import Pictures
from lwf_lightning.study.kept import Kept
from lwf_lightning.study.matrix import Record, tuning_in_words
from lwf_lightning.study.measure import measure_of
from lwf_lightning.study.pooled import Pooled
from lwf_lightning.study.summary import Line
from lwf_lightning.study.tables import kept_table, pooled_table, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
  color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block;
  overflow-x: auto; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e5e5e5; text-align: right;
  font-variant-numeric: tabular-nums; white-space: pre; vertical-align: top; }
th { border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
.words-last th:last-child, .words-last td:last-child { text-align: left; white-space: normal; }
tr.baseline td { background: #f4f4f4; font-weight: 600; }
img { max-width: 100%; height: auto; margin: 0.5em 0 1.5em; } code { font-size: 12px; }
details { margin: 1em 0; } .note { color: #666; font-size: 13px; }
"""


def write_page(
    study: Study,
    lines: Sequence[Line],
    pooled: Sequence[Pooled],
    kept: Sequence[Kept],
    records: Sequence[Record],
    missing: Sequence[str],
    pictures: Pictures,
    path: Path,
) -> None:
    """Writes the page, whole or not at all.

    Args:
        study: The study.
        lines: Its summary.
        pooled: Its methods over all cells; none with one cell.
        kept: What validation keeps of a number of runs; none without tuning.
        records: All its records, for commands and versions.
        missing: What it lacks, in words.
        pictures: Its figures; each is put into the page.
        path: The HTML file.
    """
    measure = measure_of(study.figure)
    less = "" if measure.sign > 0 else ", of which less is better: how far a method is below it"
    body = [
        f"<h1>Study: {html.escape(study.name)}</h1>",
        f'<p class="note">{html.escape(_provenance(study, records))}</p>',
        f"<p>Gains are differences to {html.escape(study.label(study.baseline))}, seed by seed, in "
        f"{measure.unit} of <code>{html.escape(study.figure)}</code>{less}, with 95&nbsp;% "
        "intervals of Student's t; p is of the paired t-test, adjusted after Benjamini and "
        "Hochberg for all comparisons of the study, without the ceiling, each counted once where "
        "cells share its runs. The share of the gap has Fieller's interval, and is a dash where "
        "the gap's own interval holds 0 or the ceiling is below the baseline: there may be nothing "
        "to win back.</p>",
        "<p>Time and memory are multiples of the baseline's: of the median seconds of a run, "
        "counting with the others the one that elicits texts for them, and of the median peak "
        "resident memory of the whole process, Python and torch included (on a GPU, of what torch "
        "allocates there); runs that were resumed count in neither.</p>",
        *(f"<p>{html.escape(line)}</p>" for line in tuning_in_words(study)),
        *(f"<p>Not there yet: {html.escape(line)}</p>" for line in missing),
    ]
    if pooled:
        table = pooled_table(study, pooled)
        body += _section(
            table.title,
            _table(table.headings, table.rows),
            "The first interval says what other seeds may give in these same "
            "cells; it is the thick one of the figure, and there is none where cells have one "
            "seed. The second, the thin one between ticks, says what other cells may give. Cells "
            "that share runs, such as the baseline's, rise and fall together: they are one "
            "observation of the second, and the first takes their mean, seed by seed. The column "
            "of cells says in how many such groups they are, where any share runs; the gain is "
            "the mean over groups.",
        )
    if pictures.pooled is not None:
        body.append(_picture("gain over all cells", pictures.pooled))
    if pooled:
        body += _of_runs(study, kept, pictures)
    if pictures.map is not None:
        body.append("<h2>where it pays</h2>" + _picture("where it pays", pictures.map))
    for cell in study.cells:
        own = [line for line in lines if line.cell == cell]
        if not own:
            continue
        body.append(f"<h2>{html.escape(cell)}</h2>")
        comparison, *others = tables(study, own)
        marks = ["baseline" if line.method == study.baseline else "" for line in own]
        body.append(_table(comparison.headings, comparison.rows, marks, words_last=True))
        body += [
            f"<h3>{html.escape(title)}</h3>" + _picture(f"{cell}: {title}", file)
            for title, file in pictures.cells.get(cell, {}).items()
        ]
        body += [
            f"<h3>{html.escape(table.title)}</h3>" + _table(table.headings, table.rows)
            for table in others
        ]
    if not pooled:
        body += _of_runs(study, kept, pictures)
    body.append(_commands(records))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(study.name)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _of_runs(study: Study, kept: Sequence[Kept], pictures: Pictures) -> list[str]:
    """The runs that validation keeps; nothing without tuning."""
    if not kept:
        return []
    table = kept_table(study, kept)
    rows = [[row[0], *(cell.replace(", ", "\n", 1) for cell in row[1:])] for row in table.rows]
    marks = ["baseline" if row[0] == study.label(study.baseline) else "" for row in rows]
    note = (
        "As one does who wants a model and not a mean: of a number of trials, each a setting of "
        "the method's space with a seed of its own, the one that validates best is kept. Its "
        "figure on the test split, expected over the draws of as many from all trials, and how "
        "much better it is than that of as many runs of the baseline"
    )
    if len(study.cells) > 1:
        note += ", mean over cells; the 95 % interval has the cells as its sample"
    body = _section(table.title, _table(table.headings, rows, marks), f"{note}.")
    if pictures.kept is not None:
        body.append(_picture("the run that validation keeps", pictures.kept))
    return body


def _section(title: str, table: str, note: str) -> list[str]:
    return [f"<h2>{html.escape(title)}</h2>{table}", f'<p class="note">{html.escape(note)}</p>']


def _picture(title: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _provenance(study: Study, records: Sequence[Record]) -> str:
    commits = sorted({record["commit"] or "unknown" for record in records})
    versions: dict[str, list[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    told = ", ".join(f"{name} {' and '.join(own)}" for name, own in versions.items())
    compared = sum(record["stage"] == "comparison" for record in records)
    return (
        f"{compared} runs compared and {len(records) - compared} for tuning, from {study.base}; "
        f"commit {', '.join(commits)}; {told}"
    )


def _commands(records: Sequence[Record]) -> str:
    rows = [
        (
            r["method"],
            str(r["seed"]),
            r["stage"] + (", diverged" if "diverged" in r else ""),
            f"{r['seconds']:.0f} s" + (" (since it was resumed)" if r.get("resumed") else ""),
            r["command"],
        )
        for r in records
    ]
    table = _table(("method", "seed", "stage", "time", "command"), rows, words_last=True)
    return f"<details><summary>Every run and its command</summary>{table}</details>"


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    marks: Sequence[str] | None = None,
    *,
    words_last: bool = False,
) -> str:
    head = "".join(
        f"<th>{html.escape(heading.replace(' %', chr(0xA0) + '%'))}</th>" for heading in headings
    )
    lines = [
        f'<tr class="{mark}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row, mark in zip(rows, marks or [""] * len(rows), strict=True)
    ]
    kind = ' class="words-last"' if words_last else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
