"""Tasks from texts that ship with Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lwf_lightning.data.rows import task_rows
from lwf_lightning.study.questions.material import (
    CHOICES,
    SPLITS,
    TASKS,
    code_pairs,
    dialogue_pairs,
    rows,
    write_tasks,
)


def test_tasks_are_the_same_every_time_and_never_repeat_a_text(tmp_path: Path) -> None:
    counts = write_tasks(tmp_path / "a", seed=1)
    assert write_tasks(tmp_path / "b", seed=1) == counts
    for task in TASKS:
        texts = []
        for split in SPLITS:
            file = tmp_path / "a" / task / f"{split}.jsonl"
            assert file.read_bytes() == (tmp_path / "b" / task / f"{split}.jsonl").read_bytes()
            for row in task_rows(file.parent, split):
                assert len(row.texts("choices")) == CHOICES
                right = row.texts("choices")[row.index("label", below=CHOICES)]
                texts.append((row.text("prompt"), right))
        assert len({prompt for prompt, _ in texts}) == len(texts) == sum(counts[task].values())
        assert len({right for _, right in texts}) == len(texts)
        assert counts[task]["train"] == SPLITS["train"]
        assert counts[task]["test"] >= 64


def test_pairs_go_on_with_their_own_text() -> None:
    heads = dict(code_pairs())
    assert all("def " in start or start.startswith("@") for start in heads)
    asked = dict(dialogue_pairs())
    assert all(">>>" in start for start in asked if len(start) < 60)
    assert any(end.startswith("Traceback") for end in asked.values())


def test_the_right_end_is_where_the_label_says() -> None:
    pairs = [(f"start {n}", f"end {n}") for n in range(9)]
    found = rows([*pairs, ("start 3", "end 9"), ("start 10", "end 4"), (" ", "x")], 99, seed=0)
    assert {row["prompt"]: row["choices"][row["label"]] for row in found} == dict(pairs)
    assert {row["label"] for row in found} > {0}
    assert all(len(set(row["choices"])) == CHOICES for row in found)
    assert len(rows(pairs, 4, seed=0)) == 4
    assert json.dumps(found) != json.dumps(rows(pairs, 99, seed=1))


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_tasks(tmp_path / "file")
