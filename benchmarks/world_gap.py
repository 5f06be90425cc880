"""How much negative transfer does the embedded world hold? ``python -m benchmarks.world_gap``.

Fine-tunes the base model and its clean twin on the learning task with plain PyTorch, over a grid of
learning rates and numbers of steps, a few seeds each. Either model's setting is the one with the
best mean validation accuracy; the gap between their test accuracies is the negative transfer.
Nothing is forgotten here. Takes some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lwf_lightning.data.batch import EncodedText, batches_of, collate
from lwf_lightning.data.encode import encode_choices, encode_example
from lwf_lightning.demo.world import ASSETS, SPLITS
from lwf_lightning.generation import generate_answers
from lwf_lightning.losses import per_text_loss
from lwf_lightning.metrics import choice_log_likelihoods, predicted_choices
from lwf_lightning.models import load_model, load_tokenizer
from lwf_lightning.optimization import build_adamw, build_learning_rate_schedule
from lwf_lightning.tasks import Example, Task, TaskFields, load_rows, task_from_fields

MODELS = ("base", "twin")
LEARNING_RATES = (1.5e-4, 3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
STEPS = (30, 60, 120, 240)
BATCH_SIZE = 8
MAX_LENGTH = 32


@dataclass(frozen=True)
class Outcome:
    """Accuracies of one fine-tuning run, 0 to 1."""

    validation: float
    test: float
    test_exact_match: float


def main() -> None:
    """Runs the grid and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of a built world")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning runs per setting")
    options = parser.parse_args()
    fields = TaskFields(
        choices="choices", label="label", folder=str(options.assets / "data" / "world_learning")
    )
    task = task_from_fields("world_learning", fields)
    examples = {split: task.examples(load_rows(task, split)) for split in SPLITS}

    tokenizer = load_tokenizer(options.assets / "base")
    models = {name: load_model(options.assets / name) for name in MODELS}
    settings = list(itertools.product(LEARNING_RATES, STEPS))
    grid = list(itertools.product(MODELS, settings, range(options.seeds)))
    outcomes: dict[tuple[str, tuple[float, int]], list[Outcome]] = {}
    for name, setting, seed in tqdm(grid, desc="Fine-tuning", unit="run"):
        outcome = fine_tune(models[name], tokenizer, task, examples, *setting, seed)
        outcomes.setdefault((name, setting), []).append(outcome)

    print("| model | learning rate | steps | validation | test | test, exact match |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (model, (learning_rate, steps)), runs in outcomes.items():
        validation = statistics.fmean(run.validation for run in runs)
        test = spread([run.test for run in runs])
        exact = spread([run.test_exact_match for run in runs])
        print(f"| {model} | {learning_rate:g} | {steps} | {validation:.3f} | {test} | {exact} |")
    chosen = {model: best_setting(model, outcomes) for model in MODELS}
    for model, (learning_rate, steps) in chosen.items():
        runs = outcomes[model, (learning_rate, steps)]
        print(
            f"{model}: learning rate {learning_rate:g}, {steps} steps; test accuracy "
            f"{spread([run.test for run in runs])}, "
            f"exact match {spread([run.test_exact_match for run in runs])}"
        )
    base, twin = (outcomes[model, setting] for model, setting in chosen.items())
    gaps = [ceiling.test - vanilla.test for vanilla, ceiling in zip(base, twin, strict=True)]
    print(f"negative transfer (twin minus base, seed by seed): {spread(gaps)}")


def fine_tune(
    pretrained: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: dict[str, list[Example]],
    learning_rate: float,
    steps: int,
    seed: int,
) -> Outcome:
    """One run: AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, cosine to 0."""
    model = copy.deepcopy(pretrained).train()
    texts = [encode_example(tokenizer, example, MAX_LENGTH) for example in examples["train"]]
    optimizer = build_adamw(
        model.parameters(), learning_rate=learning_rate, weight_decay=0.1, betas=(0.9, 0.95)
    )
    schedule = build_learning_rate_schedule(
        optimizer, "cosine", learning_steps=steps, warmup_ratio=0.05
    )
    for chosen in itertools.islice(shuffled_batches(texts, seed), steps):
        optimizer.zero_grad()
        per_text_loss(model, collate(chosen, tokenizer.pad_token_id)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return Outcome(
        validation=choice_accuracy(model, tokenizer, examples["validation"]),
        test=choice_accuracy(model, tokenizer, examples["test"]),
        test_exact_match=exact_match(model, tokenizer, task, examples["test"]),
    )


def shuffled_batches(texts: Sequence[EncodedText], seed: int) -> Iterator[list[EncodedText]]:
    """Batches without end, each pass in a fresh order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(texts), generator=generator).tolist()
        for start in range(0, len(texts) - BATCH_SIZE + 1, BATCH_SIZE):
            yield [texts[index] for index in order[start : start + BATCH_SIZE]]


def choice_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> float:
    """Share of examples whose right choice is the most likely one."""
    right = 0
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        texts = [
            text for example in part for text in encode_choices(tokenizer, example, MAX_LENGTH)
        ]
        (batch,) = batches_of(texts, len(texts), tokenizer.pad_token_id)
        sums, counts = choice_log_likelihoods(model, batch)
        sizes = torch.tensor([len(example.choices) for example in part])
        labels = torch.tensor([example.label for example in part])
        right += int((predicted_choices(sums, counts, sizes) == labels).sum())
    return right / len(examples)


def exact_match(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]
) -> float:
    """Share of examples that greedy generation answers right."""
    prompts = [tokenizer(example.prompt).input_ids for example in examples]
    generated = generate_answers(model, tokenizer, prompts, max_new_tokens=4, batch_size=64)
    answers = [
        task.read_answer(tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated
    ]
    right = sum(
        answer == example.reference for answer, example in zip(answers, examples, strict=True)
    )
    return right / len(examples)


def best_setting(
    model: str, outcomes: dict[tuple[str, tuple[float, int]], list[Outcome]]
) -> tuple[float, int]:
    """The setting with the best mean validation accuracy; the first one of equals."""
    means = {
        setting: statistics.fmean(run.validation for run in runs)
        for (name, setting), runs in outcomes.items()
        if name == model
    }
    return max(means, key=lambda setting: means[setting])


def spread(values: Sequence[float]) -> str:
    """Mean and, in brackets, lowest and highest."""
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    main()
