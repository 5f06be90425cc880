"""Plain fine-tuning beside TRL's ``SFTTrainer`` and the ``Trainer`` of transformers.

    python -m benchmarks.training --threads 2
    python -m benchmarks.training --threads 2 --half   # a random model of 27 million parameters

Every way trains all weights of SmolLM2-135M in float32 with AdamW on the same answers of qasc and
gsm8k, in the same order and the same batches (packing alone fills its batches by tokens). The
figure counts tokens of answers per second, from the end of a run's first step to that of its last;
per second of processor time, which hardly feels other programs, it is printed beside.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from statistics import median
from typing import Any

import lightning as L
import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.harness import DATA, MODEL, QUICK_MODEL, Result, Skipped, need_data
from lwf_lightning import LWFDataModule, LWFModule
from lwf_lightning.data.batch import IGNORE_INDEX, EncodedText, collate
from lwf_lightning.models import load_model, load_tokenizer
from lwf_lightning.trainer import LWFTrainer

TASKS = ("qasc", "gsm8k")  # short and long
OURS = "LWFModule, schedule never"
Way = Callable[[], tuple[float, float]]
"""Trains from the start; tokens of answers per second by the clock, and of processor time."""


@contextmanager
def half_width_model() -> Iterator[str]:
    """The folder of a random model of SmolLM2's shape, half as wide: 27 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=15,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer(MODEL).save_pretrained(folder)
        yield folder


def mixed_texts(
    tokenizer: PreTrainedTokenizerBase, count: int, tasks: Sequence[str] = TASKS
) -> list[EncodedText]:
    """As many texts of each task, in random order."""
    texts = []
    for task in tasks:
        data = LWFDataModule(task, data_dir=str(DATA), learning_texts=-(-count // len(tasks)))
        data.tokenizer = tokenizer
        data.setup("fit")
        texts += data.learning_encoded
    random.Random(0).shuffle(texts)
    return texts[:count]


def answer_tokens(texts: Sequence[EncodedText]) -> int:
    """Tokens that carry a loss."""
    return sum(label != IGNORE_INDEX for text in texts for label in text.labels)


class StepEnds(L.Callback):
    """Notes when each step of a run by Lightning ended."""

    def __init__(self) -> None:
        self.times = Times()

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.times.note()


class TrainerStepEnds(TrainerCallback):
    """Notes when each step of a run by transformers ended."""

    def __init__(self) -> None:
        self.times = Times()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.times.note()


class Times:
    """Moments of a run, in seconds of the clock and of processor time."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.processor: list[float] = []

    def note(self) -> None:
        """Notes this moment."""
        self.clock.append(time.perf_counter())
        self.processor.append(time.process_time())

    def speeds(self, tokens: int) -> tuple[float, float]:
        """Tokens per second, between the first moment and the last."""
        moments = (self.clock, self.processor)
        clock, processor = (tokens / (seconds[-1] - seconds[0]) for seconds in moments)
        return clock, processor


def ours(texts: list[EncodedText], batch_size: int, model: str) -> Way:
    """Plain fine-tuning by this package."""

    def run() -> tuple[float, float]:
        ends = StepEnds()
        trainer = LWFTrainer(
            max_steps=len(texts) // batch_size,
            accelerator="cpu",
            logger=False,
            callbacks=[ends],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader: Any = DataLoader(texts, batch_size, collate_fn=lambda rows: collate(rows, 0))  # type: ignore[arg-type]
        trainer.fit(LWFModule(model, schedule="never", regularizer=None), loader)
        return ends.times.speeds(answer_tokens(texts[batch_size:]))

    return run


def _options(folder: str, texts: int, batch_size: int, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": texts // batch_size,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "use_cpu": True,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


def plain_trainer(
    texts: list[EncodedText], batch_size: int, model: str, tokenizer: PreTrainedTokenizerBase
) -> Way:
    """The Trainer of transformers with labels on the answers."""

    def run() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            ends = TrainerStepEnds()
            trainer = Trainer(
                load_model(model),
                TrainingArguments(**_options(folder, len(texts), batch_size)),
                train_dataset=Dataset.from_list(
                    [{"input_ids": t.input_ids, "labels": t.labels} for t in texts]
                ),
                data_collator=DataCollatorForSeq2Seq(tokenizer),
                callbacks=[ends],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return ends.times.speeds(answer_tokens(texts[batch_size:]))

    return run


def trl(
    texts: list[EncodedText],
    batch_size: int,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    **others: Any,
) -> Way:
    """TRL's SFTTrainer with its loss on the answers; ``others`` go to its ``SFTConfig``."""

    def run() -> tuple[float, float]:
        from trl import SFTConfig, SFTTrainer

        rows = [
            {
                "input_ids": text.input_ids,
                "completion_mask": [int(label != IGNORE_INDEX) for label in text.labels],
            }
            for text in texts
        ]
        options = _options("", len(texts), batch_size) | {"completion_only_loss": True} | others
        with tempfile.TemporaryDirectory() as folder:
            ends = TrainerStepEnds()
            trainer = SFTTrainer(
                load_model(model),
                SFTConfig(**options | {"output_dir": folder}),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[ends],
            )
            trainer.remove_callback(PrinterCallback)
            # what it trains on: packing fills its batches with other texts
            steps = [step["labels"][:, 1:] for step in trainer.get_train_dataloader()]
            trainer.train()
        answers = sum(int((labels != IGNORE_INDEX).sum()) for labels in steps[1:])
        return ends.times.speeds(answers)

    return run


def ways(texts: list[EncodedText], batch_size: int, model: str) -> dict[str, Way]:
    """All ways, by name; TRL's only where it is installed."""
    tokenizer = load_tokenizer(model)
    found = {
        OURS: ours(texts, batch_size, model),
        "Trainer of transformers": plain_trainer(texts, batch_size, model, tokenizer),
    }
    if find_spec("trl") is None:
        return found
    # As many tokens to a pack as a batch has on average, and one pack to a step.
    pack = max(sum(map(len, texts)) * batch_size // len(texts), *map(len, texts))
    packing = {"packing": True, "max_length": pack, "per_device_train_batch_size": 1}
    one_pass = {"max_steps": -1, "num_train_epochs": 1}
    options: dict[str, dict[str, Any]] = {
        "SFTTrainer, its defaults": {},
        "SFTTrainer, no checkpointing": {"gradient_checkpointing": False},
        "SFTTrainer, padding-free": {
            "gradient_checkpointing": False,
            "padding_free": True,
            "max_length": None,
        },
        "SFTTrainer, packing": {"gradient_checkpointing": False, **packing, **one_pass},
    }
    for name, others in options.items():
        found[name] = trl(texts, batch_size, model, tokenizer, **others)
    return found


def measure(todo: dict[str, Way], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The speeds of each way, over interleaved rounds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bars()
    disable_progress_bar()
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            for name, run in todo.items():
                speeds[name].append(run())
    return speeds


def results(
    *,
    batch_size: int = 8,
    steps: int = 3,
    rounds: int = 3,
    model: str = MODEL,
    only: Sequence[str] = (),
    quick: bool = False,
) -> Iterator[Result | Skipped]:
    """This package beside each of the others; the bar is held against the best of them."""
    if quick:
        batch_size, steps, rounds, model = 2, 2, 1, QUICK_MODEL
    else:
        need_data()
    tasks = ("world_learning",) if quick else TASKS
    texts = mixed_texts(load_tokenizer(model), batch_size * steps, tasks)
    todo = ways(texts, batch_size, model)
    others = [name for name in todo if name != OURS and (not only or name in only)]
    speeds = measure({name: todo[name] for name in (OURS, *others)}, rounds)
    if find_spec("trl") is None:
        yield Skipped("training", "SFTTrainer", "the package trl is not installed")
    clock = {name: median(by_clock for by_clock, _ in found) for name, found in speeds.items()}
    processor = {name: median(by_time for _, by_time in found) for name, found in speeds.items()}
    for name in others:
        details = {
            "answer_tokens_per_second": {OURS: clock[OURS], name: clock[name]},
            "per_second_of_processor_time": {OURS: processor[OURS], name: processor[name]},
            "ratio_of_processor_time": processor[OURS] / processor[name],
            "rounds": rounds,
            "texts_per_step": batch_size,
            "steps_timed": steps - 1,
            "tokens_per_text": sum(map(len, texts)) / len(texts),
        }
        ratio = clock[OURS] / clock[name]
        yield Result("training, answer tokens/s", name, ratio, 1.3, "at least", details=details)


def main() -> None:
    """Prints one line per comparison."""
    parser = argparse.ArgumentParser(description="Plain fine-tuning beside TRL and Trainer.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; the first is warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=(), metavar="WAY", help="beside these only")
    parser.add_argument("--half", action="store_true", help="a model of 27 million parameters")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with half_width_model() if arguments.half else nullcontext(MODEL) as model:
        for result in results(
            batch_size=arguments.batch_size,
            steps=arguments.steps,
            rounds=arguments.rounds,
            model=model,
            only=arguments.only,
        ):
            if isinstance(result, Skipped):
                print(result)
                continue
            speeds = result.details["answer_tokens_per_second"]
            print(
                f"{result.compared_with:<32}{speeds[result.compared_with]:8.1f} tokens/s, ours "
                f"{speeds[OURS]:8.1f}: {result.figure:5.2f} times, "
                f"{result.details['ratio_of_processor_time']:5.2f} in processor time",
                flush=True,
            )


if __name__ == "__main__":
    main()
