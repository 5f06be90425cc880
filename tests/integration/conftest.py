"""A tiny model, tokenizer and two tasks on disk, and runs over them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lwf_lightning import FisherCallback, LWFDataModule, LWFModule
from lwf_lightning.tasks import TaskFields
from lwf_lightning.trainer import LWFTrainer

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for task, choices in (("learn", 3), ("forget", 0)):
        for split, rows in (("train", 24), ("validation", 6), ("test", 5)):
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = []
            for _ in range(rows):
                row: dict[str, Any] = {
                    "prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))
                }
                if choices:
                    row["choices"] = [" ".join(draw.choices(WORDS, k=2)) for _ in range(choices)]
                    row["label"] = draw.randrange(choices)
                else:
                    row["answer"] = draw.choice(WORDS)
                lines.append(json.dumps(row) + "\n")
            path.write_text("".join(lines))
    return folder


@pytest.fixture
def make_module(model_folder: Path) -> Callable[..., LWFModule]:
    def make(**options: Any) -> LWFModule:
        defaults: dict[str, Any] = {"learning_rate": 1e-2, "unlearning_interval": 3}
        return LWFModule(str(model_folder), **(defaults | options))

    return make


@pytest.fixture
def make_data(data_folder: Path, tmp_path: Path) -> Callable[..., LWFDataModule]:
    def make(**options: Any) -> LWFDataModule:
        defaults: dict[str, Any] = {
            "learning_task": "learn",
            "forgetting_tasks": ["forget"],
            "data_dir": str(data_folder),
            "custom_tasks": {
                "learn": TaskFields(choices="choices", label="label"),
                "forget": TaskFields(),
            },
            "batch_size": 4,
            "forget_batch_size": 3,
            "max_new_tokens": 5,
            "cache_dir": str(tmp_path / "cache"),
        }
        return LWFDataModule(**(defaults | options))

    return make


@pytest.fixture
def make_callback() -> Callable[..., FisherCallback]:
    def make(**options: Any) -> FisherCallback:
        defaults: dict[str, Any] = {
            "probe_steps": 3,
            "probe_batch_size": 4,
            "fisher_texts": 7,
            "batch_size": 3,
        }
        return FisherCallback(**(defaults | options))

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., LWFTrainer]:
    def make(**options: Any) -> LWFTrainer:
        defaults: dict[str, Any] = {
            "max_steps": 8,
            "accelerator": "cpu",
            "default_root_dir": tmp_path / "runs",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
        }
        return LWFTrainer(**(defaults | options))

    return make
