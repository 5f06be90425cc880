"""Small tokenizers, and data folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(
    *,
    pad_token: str | None = None,
    adds: str = "",
    chat_template: str | None = None,
    sentencepiece: bool = False,
) -> PreTrainedTokenizerFast:
    """One token per byte, or per character after SentencePiece's fashion.

    ``adds`` says which special tokens are added to every text: ``bos``, ``eos`` or both.
    """
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    if sentencepiece:
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    if sentencepiece:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    if adds:
        single = f"{'<s> ' if 'bos' in adds else ''}$A{' </s>' if 'eos' in adds else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad_token
    )
    wrapped.chat_template = chat_template
    return wrapped


def write_task(folder: Path, **splits: Sequence[dict[str, object]]) -> Path:
    """Writes ``<folder>/<split>.jsonl`` for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer


@pytest.fixture
def chat_template() -> str:
    return CHAT_TEMPLATE


@pytest.fixture
def write_jsonl_task() -> Callable[..., Path]:
    return write_task


@pytest.fixture
def shared_data() -> Path:
    """The five real tasks; skips where they are not there."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("LWF_DATA_DIR", default))
    if not (folder / "qasc" / "train.jsonl").is_file():
        pytest.skip(
            f"no real data in {folder}: set LWF_DATA_DIR to the folder with qasc, gsm8k, ..."
        )
    return folder
