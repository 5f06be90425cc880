"""Changes to a configuration by dotted paths, as a study's methods state them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def overlaid(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with some values changed.

    A path is a dotted name. It leads through ``init_args`` by itself, and where a list of classes
    stands, its next part is the name of a class in that list: ``model.schedule``,
    ``trainer.callbacks.FisherCallback.strategy``. A class that the list lacks is added by
    its whole path: ``trainer.callbacks`` with a mapping of ``class_path``; one that it holds is
    replaced so.

    Args:
        config: A configuration of the command line, as its YAML file holds it.
        changes: Path -> new value.

    Raises:
        ValueError: If a path leads nowhere; the message names it.

    Example:
        >>> config = {"model": {"class_path": "LWFModule", "init_args": {"seed": 0}}}
        >>> overlaid(config, {"model.seed": 3})
        {'model': {'class_path': 'LWFModule', 'init_args': {'seed': 3}}}
    """
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for path, value in changes.items():
        *way, last = path.split(".")
        node: Any = changed
        for part in way:
            node = _enter(node, part, path)
        node = _arguments(node)
        if not isinstance(node, dict):
            raise ValueError(f"{path}: {way[-1]} holds no named values")
        node[last] = _with_class(node.get(last), copy.deepcopy(value))
    return changed


def _with_class(present: Any, value: Any) -> Any:
    """The new value of what is present: a class does not replace a list, but joins it."""
    if not (isinstance(present, list) and isinstance(value, Mapping) and "class_path" in value):
        return value
    for place, item in enumerate(present):
        if class_path(item) == value["class_path"]:
            return [*present[:place], value, *present[place + 1 :]]
    return [*present, value]


def class_path(item: Any) -> str:
    """The class of an item of a list; without arguments it may be written as a name."""
    return str(item.get("class_path", "") if isinstance(item, Mapping) else item)


def looked_up(config: Mapping[str, Any], path: str) -> Any:
    """The value at a path of :func:`overlaid`; None where nothing is set."""
    node: Any = config
    for part in path.split("."):
        node = _arguments(node)
        if isinstance(node, list):
            node = _in_list(node, part, path)
        elif isinstance(node, Mapping):
            node = node.get(part)
        else:
            return None
    return node


def _enter(node: Any, part: str, path: str) -> Any:
    node = _arguments(node)
    if isinstance(node, list):
        return _in_list(node, part, path)
    if not isinstance(node, dict):
        raise ValueError(f"{path}: nothing can be set below {part}")
    return node.setdefault(part, {})


def _arguments(node: Any) -> Any:
    """The arguments of a class where the node is one."""
    return (
        node.setdefault("init_args", {})
        if isinstance(node, dict) and "class_path" in node
        else node
    )


def _in_list(items: list[Any], name: str, path: str) -> Any:
    for place, item in enumerate(items):
        if class_path(item).split(".")[-1] == name:
            if isinstance(item, str):
                items[place] = {"class_path": item}
            return items[place]
    raise ValueError(
        f"{path}: the list holds no {name}, only "
        + (", ".join(class_path(item) for item in items) or "nothing")
    )
