"""Tasks: how rows become prompts and gold answers, and how answers are read."""

from lwf_lightning.tasks.base import Example, Task
from lwf_lightning.tasks.fields import ChoiceStyle, FieldsTask, TaskFields, task_from_fields
from lwf_lightning.tasks.hub import hub_rows
from lwf_lightning.tasks.load import Source, load_rows
from lwf_lightning.tasks.registry import TASK_NAMES, get_task

__all__ = [
    "TASK_NAMES",
    "ChoiceStyle",
    "Example",
    "FieldsTask",
    "Source",
    "Task",
    "TaskFields",
    "get_task",
    "hub_rows",
    "load_rows",
    "task_from_fields",
]
