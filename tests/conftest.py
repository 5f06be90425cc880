"""Small models and texts that many tests share, and whole runs over a tiny model and two tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lwf_lightning import FisherCallback, LWFDataModule, LWFModule
from lwf_lightning.data.batch import EncodedText
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.shards import whole
from lwf_lightning.tasks import TaskFields
from lwf_lightning.trainer import LWFTrainer

VOCABULARY = 37
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture
def empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in it, so that what is written to a relative path shows."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def random_texts(count: int, *, seed: int = 0, longest: int = 11) -> list[EncodedText]:
    """Texts of unequal length whose last tokens are labelled."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        prompt = int(torch.randint(1, length - 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        texts.append(EncodedText(tuple(ids), (*[-100] * prompt, *ids[prompt:])))
    return texts


def tiny_llama(*, tied: bool = False, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters in training mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=28,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).train()


class Recorder(L.Callback):
    """Keeps the weights after each learning step, and the number of the step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.global_steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        weights = copy_weights(pl_module.model)
        self.weights.append({name: whole(tensor) for name, tensor in weights.items()})
        self.global_steps.append(trainer.global_step)


@pytest.fixture
def make_recorder() -> Callable[[], Recorder]:
    return Recorder


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def make_texts() -> Callable[..., list[EncodedText]]:
    return random_texts


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


@pytest.fixture(scope="session")
def make_config(model_folder: Path, data_folder: Path) -> Callable[..., dict[str, Any]]:
    """What a configuration file holds: the tiny model, the two tasks, and more for each part."""

    def make(
        *,
        trainer: dict[str, Any] | None = None,
        callbacks: dict[str, dict[str, Any]] | None = None,
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        named = {"FisherCallback": {"probe_steps": 2}} | (callbacks or {})
        return {
            "trainer": {
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "callbacks": [
                    {"class_path": f"lwf_lightning.callbacks.{name}", "init_args": options}
                    for name, options in named.items()
                ],
                **(trainer or {}),
            },
            "model": {
                "class_path": "lwf_lightning.LWFModule",
                "init_args": {"model_name": str(model_folder), **(model or {})},
            },
            "data": {
                "class_path": "lwf_lightning.LWFDataModule",
                "init_args": {
                    "data_dir": str(data_folder),
                    "learning_task": "learn",
                    "forgetting_tasks": ["forget"],
                    "custom_tasks": {
                        "learn": {"choices": "choices", "label": "label"},
                        "forget": {},
                    },
                    "batch_size": 4,
                    "max_new_tokens": 4,
                    **(data or {}),
                },
            },
        }

    return make


@pytest.fixture
def make_module(model_folder: Path) -> Callable[..., LWFModule]:
    def make(**options: Any) -> LWFModule:
        defaults: dict[str, Any] = {
            "learning_rate": 1e-2,
            "unlearning_interval": 3,
            "regularizer": None,
        }
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
