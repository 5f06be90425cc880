"""What a study's file may hold that its parser overlooks, or refuses without a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lwf_lightning.cli_errors import OneLineErrorParser
from lwf_lightning.study.config import Method


class StudyParser(OneLineErrorParser):
    """A parser that looks through the files that it reads."""

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a study's file; an error names what is wrong in it."""
        try:
            check_file(Path(str(path)))
        except ValueError as error:
            self.error(str(error), error)
        return super().parse_path(path, *args, **kwargs)


def check_file(path: Path) -> None:
    """Looks through a study's file; one that is not there or no YAML is left to the parser.

    Raises:
        ValueError: If a key stands twice, a method has one that no method has, or what tuning may
            choose is no list; names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        for key in _repeated_keys(yaml.compose(text, yaml.SafeLoader)):
            raise ValueError(f"{path}: {key} stands there twice, and the first would be ignored")
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError):
        return
    content = content if isinstance(content, dict) else {}
    methods = content.get("methods")
    _check_space(path, "common_space", content.get("common_space"))
    known = [field.name for field in fields(Method)]
    for name, method in (methods if isinstance(methods, dict) else {}).items():
        if isinstance(method, dict):
            _check_space(path, f"methods.{name}.space", method.get("space"))
        for key in map(str, method if isinstance(method, dict) else ()):
            if key not in known:
                near = get_close_matches(key, known, 1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                told = f"methods.{name} has no {key!r}, only {', '.join(known)}{meant}"
                raise ValueError(f"{path}: {told}")


def _check_space(path: Path, name: str, space: Any) -> None:
    for key, values in (space if isinstance(space, dict) else {}).items():
        if not isinstance(values, list):
            raise ValueError(f"{path}: {name}: {key} is no list to choose from: write [{values}]")


def _repeated_keys(node: Any, at: str = "") -> Iterator[str]:
    """Whole names of the keys that a mapping holds twice; YAML takes the last one silently."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, at)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{at}.{key.value}".lstrip(".")
            if name in seen:
                yield name
            seen.add(name)
            yield from _repeated_keys(value, name)
