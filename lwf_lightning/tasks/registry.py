"""Tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lwf_lightning
from lwf_lightning.tasks.base import Task
from lwf_lightning.tasks.choice import CHOICE_TASKS
from lwf_lightning.tasks.fields import ChoiceStyle, TaskFields, task_from_fields
from lwf_lightning.tasks.math import Gsm8k

_WORLD = Path(lwf_lightning.__file__).parent / "demo" / "assets" / "data"
_WORLD_TASKS = {
    name: TaskFields(choices="choices", label="label", folder=str(_WORLD / name))
    for name in ("world_learning", "world_forgetting")
}
_FIELD_TASKS = CHOICE_TASKS | _WORLD_TASKS

TASK_NAMES = ("gsm8k", *_FIELD_TASKS)
"""The built-in tasks."""


def get_task(
    name: str,
    custom: Mapping[str, TaskFields] | None = None,
    *,
    choice_style: ChoiceStyle = "text",
) -> Task:
    r"""Finds a task by name.

    Args:
        name: A built-in task or a key of ``custom``.
        custom: The user's own tasks: ``data.init_args.custom_tasks``.
        choice_style: How choices are shown; see :func:`task_from_fields`.

    Raises:
        ValueError: If the name is unknown (naming those that are known and how to define one), or
            a custom task has a built-in's name.

    Example:
        >>> get_task("qasc").stop
        ('\nQuestion:',)
    """
    custom = custom or {}
    for taken in sorted(set(custom) & set(TASK_NAMES)):
        raise ValueError(
            f"data.init_args.custom_tasks: {taken!r} is a built-in task; choose another name"
        )
    if name == "gsm8k":
        return Gsm8k()
    fields = custom.get(name) or _FIELD_TASKS.get(name)
    if fields is None:
        known = ", ".join([*TASK_NAMES, *custom])
        raise ValueError(
            f"unknown task {name!r}; known: {known}. A JSONL task of your own is defined by its "
            f"field names: data.init_args.custom_tasks: "
            f"{{{name}: {{prompt: <field>, answer: <field>}}}}"
        )
    return task_from_fields(name, fields, choice_style)
