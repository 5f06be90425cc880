"""Scoring and Fisher beside a plain pass over the same texts, and beside what others would use.

    python -m benchmarks.scoring              # all sizes
    python -m benchmarks.scoring --tokens 64  # one length of text

Times are ratios of medians over interleaved rounds. Memory is the peak of a process of its own
beyond what model, Fisher, anchor and texts already take, with malloc set as in
``benchmarks.memory``, so that freed memory does not count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from benchmarks.harness import DATA, Result, Skipped, ratio_of_medians, resident, take_turns
from benchmarks.memory import child_environment
from benchmarks.scoring_ways import (
    FISHER,
    OPACUS,
    PLAIN,
    SCORING,
    TEXT_BY_TEXT,
    VMAP,
    make_batch,
    make_model,
    make_ways,
)
from lwf_lightning.data.batch import Batch, batches_of
from lwf_lightning.data.encode import encode_examples
from lwf_lightning.data.rows import DataError
from lwf_lightning.models import load_model, load_tokenizer
from lwf_lightning.tasks import get_task, load_rows

TEXTS = 8  # of a batch
TOKENS = (
    4096  # of a run: what a result costs once, as its own memory, is then small beside the texts
)
QASC_BATCHES = 8
NO_OPACUS = "opacus is not installed; it comes with the extra `bench`"
AT_MOST, AT_LEAST = "at most", "at least"
Better = Literal["at most", "at least"]
# (the faster or smaller way, the other, bar, which side of it is good) by tokens of a text; a
# figure "at least" is the other way's time divided by the first one's.
TIME_BARS: dict[int, list[tuple[str, str, float, Better]]] = {
    16: [(SCORING, TEXT_BY_TEXT, 2.0, AT_LEAST)],
    64: [
        (SCORING, PLAIN, 1.30, AT_MOST),
        (FISHER, PLAIN, 1.20, AT_MOST),
        (SCORING, TEXT_BY_TEXT, 1.4, AT_LEAST),
        (SCORING, VMAP, 1.6, AT_LEAST),
        (SCORING, OPACUS, 1.6, AT_LEAST),
    ],
    256: [
        (SCORING, PLAIN, 1.20, AT_MOST),
        (FISHER, PLAIN, 1.20, AT_MOST),
    ],
}
MEMORY_BARS: list[tuple[str, str, float]] = [
    (SCORING, PLAIN, 1.2),
    (SCORING, VMAP, 1 / 3),
    (SCORING, OPACUS, 1 / 3),
]


def results(
    *,
    quick: bool = False,
    tokens: Sequence[int] = tuple(TIME_BARS),
    rounds: int = 5,
) -> Iterator[Result | Skipped]:
    """Every comparison; ``quick`` runs them once on a tiny model."""
    if quick:
        rounds = 1
    for length in tokens:
        model = make_model(tiny=quick)
        batches = 1 if quick else TOKENS // (TEXTS * length)
        texts = [make_batch(TEXTS, length) for _ in range(batches)]
        yield from _times(make_ways(model, texts), TIME_BARS[length], f"{length} tokens", rounds)
    if not quick:
        yield from _smollm2(rounds)
    yield from _memory(tiny=quick)


def _times(
    ways: Mapping[str, Callable[[], object]],
    bars: Sequence[tuple[str, str, float, Better]],
    size: str,
    rounds: int,
) -> Iterator[Result | Skipped]:
    wanted = dict.fromkeys(name for first, second, *_ in bars for name in (first, second))
    seconds = take_turns({name: ways[name] for name in wanted if name in ways}, rounds=rounds)
    for first, second, bar, better in bars:
        work = f"{first}, {size}"
        if second not in seconds:
            yield Skipped(work, second, NO_OPACUS)
            continue
        pair = (first, second) if better == AT_MOST else (second, first)
        yield Result(
            work=f"time of {work}" if better == AT_MOST else f"speed of {work}",
            compared_with=second,
            figure=ratio_of_medians(*(seconds[name] for name in pair)),
            bar=bar,
            better=better,
            details={
                "median seconds": {name: median(seconds[name]) for name in (first, second)},
                "seconds": {name: seconds[name] for name in (first, second)},
                "texts of a batch": TEXTS,
            },
        )


def _smollm2(rounds: int) -> Iterator[Result | Skipped]:
    name = f"{SCORING}, SmolLM2-135M, qasc"
    try:
        texts, model = qasc_batches(QASC_BATCHES), load_model("smollm2-135m").eval()
    except (DataError, ValueError) as error:
        yield Skipped(name, PLAIN, str(error))
        return
    bars: list[tuple[str, str, float, Better]] = [
        (SCORING, PLAIN, 1.25, AT_MOST),
        (FISHER, PLAIN, 1.20, AT_MOST),
    ]
    tokens = sum(batch["labels"].shape[1] for batch in texts) / len(texts)
    size = f"SmolLM2-135M, qasc ({tokens:.0f} tokens)"
    yield from _times(make_ways(model, texts), bars, size, max(3, rounds - 2))


def qasc_batches(batches: int) -> list[Batch]:
    """Real texts: the first of the task qasc, with SmolLM2's tokens."""
    task = get_task("qasc")
    rows = load_rows(task, "train", data_dir=DATA)
    tokenizer = load_tokenizer("smollm2-135m")
    texts, _ = encode_examples(tokenizer, task.examples(rows[: TEXTS * batches]), 256)
    return list(batches_of(texts, TEXTS, tokenizer.pad_token_id))


def _memory(*, tiny: bool) -> Iterator[Result | Skipped]:
    """Peaks of one batch, and of scoring four. Tiny ones are taken in this process."""
    peaks: dict[tuple[str, int], int] = {}

    def peak(way: str, batches: int = 1) -> int:
        if (way, batches) not in peaks:
            measure = _tiny_peak if tiny else _peak_of_a_process
            peaks[way, batches] = measure(way, batches)
        return peaks[way, batches]

    for first, second, bar in MEMORY_BARS:
        if second == OPACUS and OPACUS not in make_ways(make_model(tiny=True), []):
            yield Skipped(f"extra memory of {first}", second, NO_OPACUS)
            continue
        mine, other = peak(first), peak(second)
        yield Result(
            work=f"extra memory of {first}, 64 tokens",
            compared_with=second,
            figure=mine / other,
            bar=bar,
            details={"bytes": {first: mine, second: other}},
        )
    one, four = peak(SCORING), peak(SCORING, 4)
    yield Result(
        work=f"extra memory of {SCORING}, four batches",
        compared_with="one batch",
        figure=four / one,
        bar=1.05,
        details={"bytes": {"four": four, "one": one}},
    )


def _peak_of_a_process(way: str, batches: int) -> int:
    command = [sys.executable, "-m", "benchmarks.scoring", "--peak-of", way]
    command += ["--batches", str(batches)]
    root = Path(__file__).parents[1]
    environment = child_environment()
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def _tiny_peak(way: str, batches: int) -> int:
    return max(1, _peak(way, batches, tiny=True))


def _peak(way: str, batches: int, *, tiny: bool = False) -> int:
    """Bytes that one run of a way takes at its peak beyond what lies in memory before it."""
    for run in make_ways(make_model(tiny=True), [make_batch(2, 8)]).values():
        run()  # loads libraries and their buffers
    ways = make_ways(make_model(tiny=tiny), [make_batch(TEXTS, 64) for _ in range(batches)])
    _, before = resident()
    ways[way]()
    return resident()[0] - before


def main() -> None:
    """Prints one line per result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", choices=TIME_BARS, default=[*TIME_BARS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1, help="of --peak-of")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-of", metavar="WAY", help="print the extra memory of one way")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(_peak(options.peak_of, options.batches))
        return
    found = results(tokens=options.tokens, rounds=options.rounds)
    for line in (result.as_json() for result in found):
        print(_as_text(line), flush=True)


def _as_text(line: Mapping[str, Any]) -> str:
    compared = f"{line['work']}, compared with {line['compared_with']}"
    if "skipped" in line:
        return f"{compared}: skipped, {line['skipped']}"
    verdict = "met" if line["met"] else "missed"
    return f"{compared}: {line['figure']:.2f} ({line['better']} {line['bar']:.2f}: {verdict})"


if __name__ == "__main__":
    main()
