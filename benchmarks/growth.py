"""How time and memory grow with texts, length, parameters and the forgetting interval.

    python -m benchmarks.growth              # what is not measured yet, then the picture
    python -m benchmarks.growth --plot       # the picture alone

Seconds are CPU time of one thread, which other programs hardly disturb; each is a median of rounds
that take turns. Every point is appended to ``benchmarks/growth.jsonl`` when it is finished; a run
that was cut off goes on with the next point. Remove the file to measure anew. The picture,
``docs/figures/growth.png``, shows a line fitted to each curve: its slope and R squared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record
from benchmarks.harness import take_turns
from benchmarks.memory import ENVIRONMENT, forget_peak, resident
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
    "interval": [1, 2, 4, 8, 16, 32, None],
}
BATCH = 8
LEARNING_STEPS = 32


def measure(series: str, values: list[Any], rounds: int) -> Iterator[dict[str, Any]]:
    """Points: seconds and bytes by name."""
    if series == "interval":
        yield from _measure_intervals(values, rounds)
        return
    for value in values:
        yield _measure_scoring(
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


def _measure_intervals(intervals: list[int | None], rounds: int) -> Iterator[dict[str, Any]]:
    """Fits of the embedded world that take turns; all that its base model says is unlearned."""
    seconds: dict[int | None, list[float]] = {interval: [] for interval in intervals}
    peaks, steps = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        _fit(intervals[0], folder)  # warms up, and keeps what was elicited
        before = resident()[1]
        for _ in range(rounds):
            for interval in intervals:
                clock, steps[interval] = _fit(interval, folder)
                seconds[interval].append(clock.seconds)
                peaks[interval] = clock.peak - before
    for interval in intervals:
        yield {
            "size": steps[interval],
            "seconds": {"learning step": median(seconds[interval]) / LEARNING_STEPS},
            "bytes": {"learning step": peaks[interval]},
        }


class _Clock(L.Callback):
    """Times the steps of a fit, without what comes before and after them."""

    def on_train_start(self, *_: Any) -> None:
        forget_peak()
        self.start = time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.start
        self.peak = resident()[0]


def _fit(interval: int | None, folder: str) -> tuple[_Clock, int]:
    """Trains with an interval, or None for never; says how many steps unlearned, too."""
    clock = _Clock()
    module = LWFModule(
        "world-base",
        schedule="periodic" if interval else "never",
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
        max_steps=LEARNING_STEPS,
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


def main() -> None:
    """Measures what is missing and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--points", type=Path, default=POINTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--plot", action="store_true", help="draw what there is")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(options.threads)
        for point in measure(*json.loads(options.child), options.rounds):
            print(json.dumps(point), flush=True)
        return
    done = read_points(options.points)
    for series in [] if options.plot else options.series:
        missing = [value for value in SERIES[series] if key_of(series, value) not in done]
        if missing and series == "interval":
            missing = SERIES[series]  # they take turns
        for point in tqdm(_in_a_process(series, missing, options), series, len(missing)):
            with options.points.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
    from benchmarks.growth_picture import draw

    for line in draw(read_points(options.points).values(), options.picture):
        print(line)


def _in_a_process(
    series: str, values: list[Any], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields points as a process of their own finishes them."""
    if not values:
        return
    command = [sys.executable, "-m", "benchmarks.growth", "--child", json.dumps([series, values])]
    command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    environment = {**os.environ, **ENVIRONMENT}
    how = {"commit": record.commit(), "threads": options.threads}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        lines = (line for line in child.stdout or () if line.startswith("{"))
        for value, line in zip(values, lines, strict=False):
            yield {"series": series, "value": value, **how, **json.loads(line)}
    if child.returncode:
        raise RuntimeError(f"the measurement of {series} failed: its error stands above")


if __name__ == "__main__":
    main()
