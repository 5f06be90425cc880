"""Builds the embedded world from a seed: ``python -m lwf_lightning.demo.pretrain``.

Writes the base model, its clean twin and the rows of both tasks. The committed assets were made so,
with the default seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.demo.tokenizer import build_tokenizer
from lwf_lightning.demo.world import (
    ASSETS,
    Row,
    World,
    WorldConfig,
    build_world,
    forgetting_rows,
    learning_rows,
    pretraining_texts,
)
from lwf_lightning.files import whole_file, whole_folder
from lwf_lightning.generation import generate_answers
from lwf_lightning.losses import per_text_loss


@dataclass(frozen=True)
class PretrainingConfig:
    """The model and how it is pretrained.

    Attributes:
        hidden_size: Width of the model.
        intermediate_size: Width of its feed-forward blocks.
        layers: Number of blocks.
        heads: Attention heads of a block.
        steps: Optimizer steps.
        batch_size: Texts of a step.
        learning_rate: Peak learning rate of AdamW, reached after ``warmup_steps``; a cosine then
            takes it down to 0.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled weight decay of AdamW.
    """

    hidden_size: int = 128
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    steps: int = 1400
    batch_size: int = 96
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.4


def world_tokenizer(world: World) -> PreTrainedTokenizerBase:
    """The tokenizer that base model and twin share: it knows every word that either reads."""
    return build_tokenizer(pretraining_texts(world) + pretraining_texts(world, twin=True))


def new_model(
    tokenizer: PreTrainedTokenizerBase, *, seed: int, config: PretrainingConfig
) -> LlamaForCausalLM:
    """A Llama with random weights, tied embeddings and the vocabulary of a tokenizer."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    twin: bool = False,
    config: PretrainingConfig = PretrainingConfig(),
) -> LlamaForCausalLM:
    """Pretrains the base model, or its clean twin, from random weights.

    Both start from the same weights and take the same number of steps over equally many texts in
    the same order; every token but the first of a text carries loss. The weights are rounded to
    float16, the precision in which they are stored, so that a reloaded model equals a fresh one.

    Args:
        world: What there is to learn.
        tokenizer: The world's tokenizer, see :func:`world_tokenizer`.
        seed: Decides the first weights and the order of the texts.
        twin: Whether to leave the outdated facts out, see
            :func:`~lwf_lightning.demo.world.pretraining_texts`.
        config: Model and training.

    Returns:
        A float32 model in evaluation mode.
    """
    texts = [_encode(tokenizer, text) for text in pretraining_texts(world, twin=twin)]
    model = new_model(tokenizer, seed=seed, config=config)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )

    def learning_rate_factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    batches = _batches(texts, config.batch_size, seed)
    name = "clean twin" if twin else "base model"
    for _ in tqdm(range(config.steps), desc=f"Pretraining the {name}"):
        batch = collate(next(batches), tokenizer.pad_token_id)
        loss = per_text_loss(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> float:
    """Share of rows whose answer a model gives exactly by greedy generation, 0 to 1.

    Args:
        model: Any causal LM.
        tokenizer: Its tokenizer.
        rows: At least one row with ``prompt`` and ``answer``.
    """
    generated = generate_answers(
        model,
        tokenizer,
        [tokenizer(row["prompt"]).input_ids for row in rows],
        max_new_tokens=8,
        batch_size=128,
    )
    answers = [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in generated]
    pairs = zip(answers, rows, strict=True)
    return sum(bool(answer.strip() == row["answer"]) for answer, row in pairs) / len(rows)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer for ``from_pretrained``: stored in float16, half the size.

    The config asks for float32, so that it is loaded as such.

    Args:
        model: Model whose weights fit float16.
        tokenizer: Its tokenizer.
        folder: Replaced if it is there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder) as temporary:
        half: nn.Module = copy.deepcopy(model)
        half.to(torch.float16).save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)
        config_file = temporary / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) | {"dtype": "float32"}
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_rows(world: World, folder: Path) -> None:
    """Writes ``world_learning`` and ``world_forgetting``, a folder each, one JSONL file per split.

    Args:
        world: Whose tasks to write.
        folder: Parent of the two folders.
    """
    tasks = {"world_learning": learning_rows(world), "world_forgetting": forgetting_rows(world)}
    for name, splits in tasks.items():
        for split, rows in splits.items():
            with whole_file(folder / name / f"{split}.jsonl") as temporary:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                temporary.write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the world of a seed and writes it into a folder."""
    world_default, model_default = WorldConfig(), PretrainingConfig()
    parser = argparse.ArgumentParser(description="Build the embedded world from a seed.")
    parser.add_argument("--seed", type=int, default=0, help="seed of world and models (default 0)")
    parser.add_argument(
        "--output", type=Path, default=ASSETS, help="folder to write to (default: the package's)"
    )
    parser.add_argument(
        "--strength",
        type=int,
        default=world_default.strength,
        help="how often each outdated fact is repeated (default %(default)s)",
    )
    parser.add_argument(
        "--training_people",
        type=int,
        default=world_default.training_people,
        help="people that the learning task trains on (default %(default)s)",
    )
    parser.add_argument(
        "--hidden_size",
        type=int,
        default=model_default.hidden_size,
        help="width of the models, a multiple of 32 (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.hidden_size < 32 or options.hidden_size % 32:
        parser.error(f"--hidden_size must be a multiple of 32, got {options.hidden_size}")
    config = PretrainingConfig(
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        heads=options.hidden_size // 32,
    )
    world = build_world(
        options.seed,
        WorldConfig(training_people=options.training_people, strength=options.strength),
    )
    tokenizer = world_tokenizer(world)
    save_rows(world, options.output / "data")
    rows = forgetting_rows(world)
    for name, twin in (("base", False), ("twin", True)):
        model = pretrain(world, tokenizer, seed=options.seed, twin=twin, config=config)
        save_model(model, tokenizer, options.output / name)
        for part in ("outdated", "helpful", "neutral"):
            asked = [row for split in rows.values() for row in split if row["part"] == part]
            tqdm.write(f"{name}: {part} facts recalled: {recall(model, tokenizer, asked):.1%}")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    ids = (*tokenizer(text).input_ids, tokenizer.eos_token_id)
    return EncodedText(input_ids=ids, labels=ids)


def _batches(
    texts: Sequence[EncodedText], batch_size: int, seed: int
) -> Iterator[list[EncodedText]]:
    """Full batches without end, each pass in a fresh order; a batch may span two passes."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(len(texts), generator=generator).tolist()
        yield [texts[index] for index in waiting[:batch_size]]
        waiting = waiting[batch_size:]


if __name__ == "__main__":
    main()
