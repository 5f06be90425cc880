"""Scoring and Fisher beside a plain forward and backward pass over the same texts.

    python -m benchmarks.scoring --tokens 64 256 --threads 1

The ways take turns (A B C D, A B C D, ...), and each figure is a median over the rounds, so that a
busy machine slows all of them alike. CPU time counts all threads and hardly feels other programs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lwf_lightning.data.batch import Batch
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.losses import per_text_loss

PLAIN = "plain forward + backward"


def make_model(*, tied: bool) -> LlamaForCausalLM:
    """A random Llama of 27 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=tied,
        )
    )


def make_batch(texts: int, tokens: int) -> Batch:
    """Random texts of which the second half is labelled."""
    token_ids = torch.randint(3, 4096, (texts, tokens))
    labels = token_ids.clone()
    labels[:, : tokens // 2] = -100
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "labels": labels,
    }


def ways(model: nn.Module, batches: list[Batch]) -> dict[str, Callable[[], object]]:
    """What is compared; each goes once over the same texts."""
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    anchor = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(batch["input_ids"].shape[0])
    ]

    def plain() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            per_text_loss(model, batch).mean().backward()

    def text_by_text() -> None:
        for row in rows:
            model.zero_grad(set_to_none=True)
            per_text_loss(model, row).mean().backward()
            for name, parameter in model.named_parameters():
                scaled = fisher[name] * parameter.grad
                torch.dot(scaled.flatten(), parameter.grad.flatten())
                torch.dot(scaled.flatten(), (parameter.detach() - anchor[name]).flatten())

    return {
        PLAIN: plain,
        "forgetting_confidence": lambda: forgetting_confidence(
            model, batches, fisher=fisher, anchor=anchor
        ),
        "diagonal_fisher": lambda: diagonal_fisher(model, batches),
        "text by text, backward()": text_by_text,
    }


def measure(todo: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall-clock and CPU seconds of each way over interleaved rounds."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    for run in todo.values():
        run()  # warms up caches and allocators
    for _ in range(rounds):
        for name, run in todo.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (median(wall for wall, _ in runs), median(cpu for _, cpu in runs))
        for name, runs in seconds.items()
    }


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description="Scoring and Fisher beside a plain pass.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help="batches in one run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tied", action="store_true", help="tie the embeddings")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model(tied=arguments.tied)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, float32, {arguments.batches} x {arguments.texts} "
        f"texts, {arguments.threads} threads, torch {torch.__version__}, "
        f"median of {arguments.rounds} rounds"
    )
    print(f"\n{'tokens':>6}  {'way':<26}{'wall s':>8}{'ratio':>7}{'CPU s':>8}{'ratio':>7}")
    for tokens in arguments.tokens:
        batches = [make_batch(arguments.texts, tokens) for _ in range(arguments.batches)]
        found = measure(ways(model, batches), arguments.rounds)
        plain_wall, plain_cpu = found[PLAIN]
        for name, (wall, cpu) in found.items():
            print(
                f"{tokens:>6}  {name:<26}{wall:>8.3f}{wall / plain_wall:>7.2f}"
                f"{cpu:>8.3f}{cpu / plain_cpu:>7.2f}"
            )


if __name__ == "__main__":
    main()
