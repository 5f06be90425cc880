"""Small tasks in a folder, a datamodule over them, and self-knowledge for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.forgetting.elicit import SelfKnowledge, SelfText


def choice_rows(name, count):
    return [
        {"question": f"{name} {i}?", "choices": ["yes", "no", "maybe"], "label": i % 3}
        for i in range(count)
    ]


@pytest.fixture
def data_dir(tmp_path, write_jsonl_task):
    for name, train in (("qasc", 11), ("psychol", 4), ("dental", 9)):
        rows = choice_rows(name, train)
        write_jsonl_task(tmp_path / name, train=rows, validation=rows[:3], test=rows[:2])
    sums = [{"question": f"1+{i}?", "answer": f"Add.\n#### {1 + i}"} for i in range(5)]
    write_jsonl_task(tmp_path / "gsm8k", train=sums, validation=sums[:2], test=sums[:2])
    return tmp_path


@pytest.fixture
def make_data(data_dir, make_tokenizer):
    def make(learning="qasc", forgetting=("psychol", "dental"), stage="fit", **options):
        options = {"data_dir": str(data_dir), "batch_size": 4, **options}
        data = LWFDataModule(learning, list(forgetting), **options)
        data.tokenizer = make_tokenizer()
        if stage:
            data.setup(stage)
        return data

    return make


@pytest.fixture
def make_knowledge() -> Callable[[int], SelfKnowledge]:
    def make(count):
        texts = [
            SelfText(f"p{i}", "a", (9,) * (i + 1), (50 + i, 2), "psychol", i) for i in range(count)
        ]
        return SelfKnowledge(texts, dropped=0)

    return make
