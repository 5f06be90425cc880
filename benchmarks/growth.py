"""How time and memory grow with texts, length, parameters and the forgetting interval.

    python -m benchmarks.growth              # what is not measured yet, then the picture
    python -m benchmarks.growth --plot       # the picture alone

Seconds are CPU time of one thread, which other programs hardly disturb; each is a median of rounds
that take turns. Every point has a process of its own and is appended to ``benchmarks/growth.jsonl``
when it is finished; a run that was cut off goes on with the next point. Remove the file to measure
anew. The picture, ``docs/figures/growth.png``, shows a line fitted to each curve: its slope and R
squared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record
from benchmarks.growth_picture import Curve, draw
from benchmarks.harness import QUICK_MODEL, Result, take_turns
from benchmarks.memory import child_environment, forget_peak, resident
from lwf_lightning import LWFDataModule, LWFModule
from lwf_lightning.data.batch import Batch
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss
from lwf_lightning.trainer import LWFTrainer

POINTS = Path(__file__).parent / "growth.jsonl"
PICTURE = Path(__file__).parent.parent / "docs" / "figures" / "growth.png"
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "1M": (128, 384, 4, 4, 2, 1024, False),
    "4M": (256, 704, 4, 4, 2, 2048, False),
    "11M": (384, 1024, 6, 6, 3, 4096, True),
    "27M": (512, 1376, 8, 8, 4, 4096, False),
    "61M": (576, 1536, 16, 9, 3, 8192, True),
    "135M": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
}
SERIES: dict[str, list[Any]] = {
    "texts": [64, 128, 256, 512, 1024],
    "tokens": [32, 64, 128, 256, 512],
    "parameters": list(SHAPES),
    "interval": [1, 2, 4, 8, 16, None],  # by half of LEARNING_STEPS at most: else none unlearns
}
QUICK: dict[str, list[Any]] = {"texts": [8, 16], "interval": [2, None]}
BATCH = 8
LEARNING_STEPS = 32
STEEPEST = 1.1  # slope on logarithmic axes: 1 is linear
HELD = (("seconds", "Fisher"), ("seconds", "scoring"))  # against that bar


def results(*, rounds: int = 3, quick: bool = False) -> Iterator[Result]:
    """How steeply each curve grows; measures what is missing and draws the picture."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            points = [
                {"series": series, "value": value, **measure(series, value, 1, steps=2)}
                for series, values in QUICK.items()
                for value in values
            ]
            yield from _as_results(draw(points, Path(folder) / "growth.png"))
        return
    measure_missing(list(SERIES), rounds, threads=1, path=POINTS)
    points = read_points(POINTS)
    # They are kept from run to run: what measured them is not what draws them now.
    measured = sorted({(point["commit"], point["threads"]) for point in points.values()})
    yield from _as_results(draw(points.values(), PICTURE), measured_by=measured)


def _as_results(curves: Iterable[Curve], **details: Any) -> Iterator[Result]:
    for curve in curves:
        yield Result(
            f"{curve.quantity} of {curve.name} against {curve.series}",
            "a line on logarithmic axes" if curve.logarithmic else "a line, relative to its start",
            curve.growth,
            STEEPEST if (curve.quantity, curve.name) in HELD else None,
            unit="slope",
            details={
                "x": list(curve.x),
                "y": list(curve.y),
                "r_squared": curve.r_squared,
                **details,
            },
        )


def measure(series: str, value: Any, rounds: int, *, steps: int = LEARNING_STEPS) -> dict[str, Any]:
    """A point: seconds and bytes by name."""
    if series == "interval":
        return _measure_interval(value, rounds, steps)
    return _measure_scoring(
        shape={"texts": "1M", "tokens": "4M"}.get(series, value),
        texts=value if series == "texts" else BATCH,
        tokens=value if series == "tokens" else 16,
        rounds=rounds,
    )


def _measure_scoring(shape: str, texts: int, tokens: int, rounds: int) -> dict[str, Any]:
    _score(make_model("1M"), _batches(1024, BATCH, 8))  # what torch sets up once is no growth
    before = resident()[1]
    model = make_model(shape)
    vocabulary = model.config.vocab_size
    batches = _batches(vocabulary, texts, tokens)

    def plain() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            per_text_loss(model, batch).mean().backward()
        model.zero_grad(set_to_none=True)

    fisher = diagonal_fisher(model, batches[:1])
    anchor = {name: p.detach() * 0.99 for name, p in model.named_parameters()}
    ways: dict[str, Callable[[], object]] = {
        "forward and backward": plain,
        "Fisher": lambda: diagonal_fisher(model, batches),
        "scoring": lambda: forgetting_confidence(model, batches, fisher=fisher, anchor=anchor),
    }
    peaks = {}
    for name, run in ways.items():  # these rounds warm up, too
        forget_peak()
        run()
        peaks[name] = resident()[0] - before
    seconds = take_turns(ways, rounds=rounds, warm_up=0, clock=time.process_time)
    return {
        "size": sum(p.numel() for p in model.parameters()),
        "seconds": {name: median(times) for name, times in seconds.items()},
        "bytes": peaks,
    }


def make_model(shape: str) -> LlamaForCausalLM:
    """A random Llama of a size in ``SHAPES``."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied = SHAPES[shape]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    )


def _batches(vocabulary: int, texts: int, tokens: int) -> list[Batch]:
    """Random texts in batches of ``BATCH``, labelled on the second half."""
    ids = torch.randint(3, vocabulary, (texts, tokens))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [
        {key: tensor[start : start + BATCH] for key, tensor in whole.items()}
        for start in range(0, texts, BATCH)
    ]


def _score(model: LlamaForCausalLM, batches: list[Batch]) -> None:
    fisher = diagonal_fisher(model, batches)
    anchor = {name: p.detach() * 0.99 for name, p in model.named_parameters()}
    forgetting_confidence(model, batches, fisher=fisher, anchor=anchor)
    per_text_loss(model, batches[0]).mean().backward()


def _measure_interval(interval: int | None, rounds: int, steps: int) -> dict[str, Any]:
    """Fits of the embedded world, all that its base model says being unlearned."""
    with tempfile.TemporaryDirectory() as folder:
        _fit(interval, folder, steps)  # warms up, and keeps what was elicited
        before = resident()[1]
        fits = [_fit(interval, folder, steps) for _ in range(rounds)]
    return {
        "size": fits[0][1],
        "seconds": {"learning step": median(clock.seconds for clock, _ in fits) / steps},
        "bytes": {"learning step": max(clock.peak for clock, _ in fits) - before},
    }


class _Clock(L.Callback):
    """Times the steps of a fit, without what comes before and after them."""

    def on_train_start(self, *_: Any) -> None:
        forget_peak()
        self.start = time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.start
        self.peak = resident()[0]


def _fit(interval: int | None, folder: str, steps: int) -> tuple[_Clock, int]:
    """Trains with an interval, or None for never; says how many steps unlearned, too."""
    clock = _Clock()
    module = LWFModule(
        QUICK_MODEL,
        schedule="periodic" if interval else "never",
        regularizer=None,
        unlearning_interval=interval or 1,
        unlearning_scale=0.01,
        without_scores="use_all",
    )
    data = LWFDataModule(
        "world_learning",
        ["world_forgetting"],
        batch_size=16,
        forget_batch_size=16,
        max_new_tokens=8,
        cache_dir=folder,
    )
    trainer = LWFTrainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return clock, module.unlearning_steps


def key_of(series: str, value: Any) -> str:
    """The name of a point."""
    return f"{series}={value}"


def read_points(path: Path) -> dict[str, dict[str, Any]]:
    """The points measured so far."""
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    points = [json.loads(row) for row in rows]
    return {key_of(point["series"], point["value"]): point for point in points}


def measure_missing(series: list[str], rounds: int, *, threads: int, path: Path) -> None:
    """Appends the points that the file lacks, each from a process of its own."""
    done = read_points(path)
    missing = [
        (name, value)
        for name in series
        for value in SERIES[name]
        if key_of(name, value) not in done
    ]
    how = {"commit": record.commit(), "threads": threads}
    for name, value in tqdm(missing, "Growth", unit="point"):
        command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps([name, value])]
        command += ["--rounds", str(rounds), "--threads", str(threads)]
        root, environment = Path(__file__).parents[1], child_environment()
        child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"point {key_of(name, value)} failed: {child.stderr[-2000:]}")
        point = {"series": name, "value": value, **how, **json.loads(child.stdout.split("\n")[-2])}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")


def main() -> None:
    """Measures what is missing and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--points", type=Path, default=POINTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--plot", action="store_true", help="draw what there is")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(*json.loads(options.point), options.rounds)))
        return
    if not options.plot:
        measure_missing(
            options.series, options.rounds, threads=options.threads, path=options.points
        )
    for curve in draw(read_points(options.points).values(), options.picture):
        print(curve)


if __name__ == "__main__":
    main()
