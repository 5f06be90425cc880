from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from lwf_lightning.data.evaluation import collate_eval, eval_items
from lwf_lightning.data.rows import DataError
from lwf_lightning.tasks import Example

EXAMPLES = [
    Example("a:", " xx", (" x", " xx"), 1, "xx", "f:row 1"),
    Example("long:", " y", (" y", " yy", " yyy"), 0, "y", "f:row 2"),
]


def batch(tokenizer, kind):
    items = eval_items(tokenizer, EXAMPLES, kind, max_length=20)
    return collate_eval(items, task="t", kind=kind, pad_token_id=0)


def test_choice_batch_has_one_row_per_choice(make_tokenizer):
    tokenizer = make_tokenizer()
    made = batch(tokenizer, "choice")
    rows = zip(made.batch["input_ids"], made.batch["attention_mask"].bool(), strict=True)
    assert [tokenizer.decode(ids[mask]) for ids, mask in rows] == [
        "a: x",
        "a: xx",
        "long: y",
        "long: yy",
        "long: yyy",
    ]
    assert made.choice_counts.tolist() == [2, 3]
    assert made.labels.tolist() == [1, 0]
    assert (made.task, made.kind, len(made), made.examples) == ("t", "choice", 2, tuple(EXAMPLES))
    assert (made.batch["labels"] >= 0).sum(1).tolist() == [2, 3, 2, 3, 4]


def test_generate_batch_has_the_prompts(make_tokenizer):
    tokenizer = make_tokenizer(adds="bos")
    made = batch(tokenizer, "generate")
    rows = zip(made.batch["input_ids"], made.batch["attention_mask"].bool(), strict=True)
    assert [tokenizer.decode(ids[mask]) for ids, mask in rows] == ["<s>a:", "<s>long:"]
    assert (made.batch["labels"] == -100).all()
    assert made.labels.tolist() == [-1, -1]


def test_lightning_moves_it(make_tokenizer):
    moved = move_data_to_device(batch(make_tokenizer(), "choice"), torch.device("meta"))
    tensors = [*moved.batch.values(), moved.choice_counts, moved.labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.examples == tuple(EXAMPLES)


def test_long_prompt_is_named(make_tokenizer):
    with pytest.raises(DataError, match=r"f:row 2: .* 5 tokens.*data\.init_args\.max_length=4"):
        eval_items(make_tokenizer(), EXAMPLES, "generate", max_length=4)


def test_choices_that_lose_their_end_are_counted_in_a_warning(make_tokenizer):
    """Those that begin alike would be one and the same."""
    told = (
        r"the choices of 1 of 2 questions are longer than data\.init_args\.max_length=8 .* without "
        r"their end: raise it\. f:row 2 is the first"
    )
    with pytest.warns(UserWarning, match=told):
        items = eval_items(make_tokenizer(), EXAMPLES, "choice", max_length=8)
    assert [len(text) for text in items[1].texts] == [7, 8, 8]
    assert len(eval_items(make_tokenizer(), EXAMPLES, "choice", max_length=9)) == 2
