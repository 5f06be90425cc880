from __future__ import annotations

import datasets
import pytest

from lwf_lightning.data.rows import DataError
from lwf_lightning.tasks import get_task, hub_rows
from lwf_lightning.tasks.hub import HUB_TASKS

GSM8K = {"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
QASC = {
    "id": "3E7TUJ2EGCLQNOV1WEAJ2NN9ROPD9K",
    "question": "What type of water formation is formed by clouds?",
    "choices": {"text": ["pearls", "beads", "rain"], "label": ["A", "B", "C"]},
    "answerKey": "B",
    "fact1": "beads of water are formed by water vapor condensing",
    "fact2": "Clouds are made of water vapor.",
    "combinedfact": "Beads of water can be formed by clouds.",
    "formatted_question": "What type ... (A) pearls (B) beads (C) rain",
}
SST5 = {"text": "a charming film .", "label": 3, "label_text": "positive"}
DENTAL = {
    "id": "0",
    "question": "Which tooth?",
    "opa": "a",
    "opb": "b",
    "opc": "c",
    "opd": "d",
    "cop": 2,
    "choice_type": "single",
    "exp": None,
    "subject_name": "Dental",
    "topic_name": None,
}
MMLU = {
    "question": "Who studied reflexes?",
    "subject": "high_school_psychology",
    "choices": ["Freud", "Pavlov", "Jung", "Adler"],
    "answer": 1,
}


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: rows by data set, and a record of what was asked for."""
    calls, rows = [], {}

    def load_dataset(path, name=None, *, split, revision):
        calls.append((path, name, split, revision))
        return rows[path]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, rows


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("gsm8k", GSM8K, " 1+1=2 The answer is 2."),
        ("qasc", QASC, " beads"),
        ("sst5", SST5, " positive"),
        ("dental", DENTAL, " c"),
        ("psychol", MMLU, " Pavlov"),
    ],
)
def test_columns_become_examples(hub, name, row, answer):
    _, rows = hub
    rows[HUB_TASKS[name].path] = [row]
    examples = get_task(name).examples(hub_rows(name, "validation"))
    assert [example.answer for example in examples] == [answer]
    assert examples[0].source.startswith(HUB_TASKS[name].path)


def test_other_subjects_are_left_out(hub):
    _, rows = hub
    rows["openlifescienceai/medmcqa"] = [{**DENTAL, "subject_name": "Surgery"}, DENTAL]
    loaded = hub_rows("dental", "test")
    assert [row.source for row in loaded] == ["openlifescienceai/medmcqa/default/validation:row 2"]


def test_what_is_asked_of_the_hub(hub):
    calls, rows = hub
    rows["openai/gsm8k"], rows["cais/mmlu"] = [GSM8K], [MMLU]
    hub_rows("gsm8k", "train", revision="abc")
    hub_rows("psychol", "test")
    assert calls == [
        ("openai/gsm8k", "main", "train[:-473]", "abc"),
        ("cais/mmlu", "high_school_psychology", "test[75%:]", None),
        ("cais/mmlu", "professional_psychology", "test[75%:]", None),
    ]


def test_split_expressions_hold_what_they_say(tmp_path):
    """``datasets`` itself reads every expression, and no row is in two splits of ours."""
    for split in ("train", "validation", "test", "dev"):
        text = "".join(f'{{"row": "{split} {i}"}}\n' for i in range(1000))
        (tmp_path / f"{split}.jsonl").write_text(text)
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    files["dev"] = str(tmp_path / "dev.jsonl")
    for task in HUB_TASKS.values():
        seen: set[tuple[str | None, str]] = set()
        for parts in task.splits.values():
            for config, part in parts:
                loaded = datasets.load_dataset(
                    "json", data_files=files, split=part, cache_dir=str(tmp_path / "cache")
                )
                rows = {(config, row) for row in loaded["row"]}
                assert rows
                assert not rows & seen
                seen |= rows


def test_unlabelled_row_of_the_hub_is_named(hub):
    _, rows = hub
    rows["allenai/qasc"] = [{**QASC, "answerKey": ""}]
    with pytest.raises(DataError, match="allenai/qasc/default/validation:row 1: field 'label'"):
        get_task("qasc").examples(hub_rows("qasc", "test"))


def test_unexpected_columns_are_named(hub):
    _, rows = hub
    rows["SetFit/sst5"] = [{"sentence": "x"}]
    with pytest.raises(DataError, match="SetFit/sst5/default/test:row 1: column 'text' is missing"):
        hub_rows("sst5", "test")


def test_task_that_is_not_on_the_hub():
    with pytest.raises(DataError, match=r"'mine' is not on the Hub.*data\.init_args\.source"):
        hub_rows("mine", "train")
