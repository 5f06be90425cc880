"""Where the tasks of the paper stand on the Hugging Face Hub, and their rows in our fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lwf_lightning.data.rows import DataError, Row, Split

Part = tuple[str | None, str]
"""A configuration of a Hub data set and a split expression, as in ``("main", "train[:-473]")``."""


@dataclass(frozen=True)
class HubTask:
    """A task's place on the Hub.

    Attributes:
        path: Name of the data set.
        splits: The parts that make up each of our splits.
        to_fields: From a row in the Hub's columns to the fields of our JSONL files; None for a
            row that is left out.
    """

    path: str
    splits: Mapping[Split, tuple[Part, ...]]
    to_fields: Callable[[Mapping[str, Any]], dict[str, object] | None]


def gsm8k_fields(row: Mapping[str, Any]) -> dict[str, object]:
    """From ``question, answer`` of openai/gsm8k."""
    return {"question": row["question"], "answer": row["answer"]}


def qasc_fields(row: Mapping[str, Any]) -> dict[str, object]:
    """From ``question, choices {text, label}, answerKey`` of allenai/qasc."""
    choices = row["choices"]
    letters = list(choices["label"])
    label = letters.index(row["answerKey"]) if row["answerKey"] in letters else -1
    return {"question": row["question"], "choices": list(choices["text"]), "label": label}


def sst5_fields(row: Mapping[str, Any]) -> dict[str, object]:
    """From ``text, label`` of SetFit/sst5, whose label runs from very negative to very positive."""
    sentiments = ["very negative", "negative", "neutral", "positive", "very positive"]
    return {"question": row["text"], "choices": sentiments, "label": row["label"]}


def dental_fields(row: Mapping[str, Any]) -> dict[str, object] | None:
    """From ``question, opa..opd, cop, subject_name`` of openlifescienceai/medmcqa; Dental only."""
    if row["subject_name"] != "Dental":
        return None
    choices = [row["opa"], row["opb"], row["opc"], row["opd"]]
    return {"question": row["question"], "choices": choices, "label": row["cop"]}


def psychol_fields(row: Mapping[str, Any]) -> dict[str, object]:
    """From ``question, choices, answer`` of cais/mmlu, where ``answer`` is an index."""
    return {"question": row["question"], "choices": list(row["choices"]), "label": row["answer"]}


_HIGH_SCHOOL, _PROFESSIONAL = "high_school_psychology", "professional_psychology"

HUB_TASKS: dict[str, HubTask] = {
    # Without a validation split at the source: the last training rows are held out.
    "gsm8k": HubTask(
        "openai/gsm8k",
        {
            "train": (("main", "train[:-473]"),),
            "validation": (("main", "train[-473:]"),),
            "test": (("main", "test"),),
        },
        gsm8k_fields,
    ),
    # The official test splits of qasc and medmcqa have no labels: the validation split stands in.
    "qasc": HubTask(
        "allenai/qasc",
        {
            "train": ((None, "train[:-500]"),),
            "validation": ((None, "train[-500:]"),),
            "test": ((None, "validation"),),
        },
        qasc_fields,
    ),
    "sst5": HubTask(
        "SetFit/sst5",
        {
            "train": ((None, "train"),),
            "validation": ((None, "validation"),),
            "test": ((None, "test"),),
        },
        sst5_fields,
    ),
    "dental": HubTask(
        "openlifescienceai/medmcqa",
        {
            "train": ((None, "train[:95%]"),),
            "validation": ((None, "train[95%:]"),),
            "test": ((None, "validation"),),
        },
        dental_fields,
    ),
    # MMLU trains on nothing, so this split is ours: a quarter of the official test rows is kept
    # for testing.
    "psychol": HubTask(
        "cais/mmlu",
        {
            "train": (
                (_HIGH_SCHOOL, "test[:75%]+validation+dev"),
                (_PROFESSIONAL, "test[:75%]+dev"),
            ),
            "validation": ((_PROFESSIONAL, "validation"),),
            "test": ((_HIGH_SCHOOL, "test[75%:]"), (_PROFESSIONAL, "test[75%:]")),
        },
        psychol_fields,
    ),
}
"""The tasks that can be loaded from the Hub."""


def hub_rows(name: str, split: Split, *, revision: str | None = None) -> list[Row]:
    """Loads one split of a task of the paper from the Hub through ``datasets``.

    Args:
        name: One of :data:`HUB_TASKS`.
        split: Our split; which rows of the source it takes stands in :data:`HUB_TASKS`.
        revision: Branch, tag or commit of the data set on the Hub.

    Raises:
        DataError: If the task is not on the Hub, or its columns are not the expected ones.
    """
    if name not in HUB_TASKS:
        raise DataError(
            f"task {name!r} is not on the Hub (there are: {', '.join(HUB_TASKS)}); "
            "set data.init_args.source to local"
        )
    # Slow to import, and not needed for local files.
    from datasets import load_dataset  # type: ignore[import-untyped]

    task = HUB_TASKS[name]
    rows = []
    for config, part in task.splits[split]:
        place = f"{task.path}/{config or 'default'}/{part}"
        loaded = load_dataset(task.path, config, split=part, revision=revision)
        for number, columns in enumerate(loaded, start=1):
            source = f"{place}:row {number}"
            try:
                fields = task.to_fields(columns)
            except KeyError as error:
                raise DataError(f"{source}: column {error} is missing at the source") from error
            if fields is not None:
                rows.append(Row(fields, source))
    return rows
