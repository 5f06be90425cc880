"""The choice tasks of the paper: qasc, sst5, dental (MedMCQA) and psychol (MMLU psychology)."""

from __future__ import annotations

from lwf_lightning.tasks.fields import TaskFields

QUESTION = TaskFields(
    prompt="question",
    choices="choices",
    label="label",
    prompt_template="Question: {prompt}\nAnswer:",
)
REVIEW = TaskFields(
    prompt="question",
    choices="choices",
    label="label",
    prompt_template="Review: {prompt}\nSentiment:",
)

CHOICE_TASKS = {"qasc": QUESTION, "sst5": REVIEW, "dental": QUESTION, "psychol": QUESTION}
"""Fields and prompt of each choice task of the paper."""
