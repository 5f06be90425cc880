"""What a configuration gives by name: objectives, regularizers, learning losses; and names told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` unless ``name`` is one of those known; ``kind`` says of what."""
    names = list(known)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(names)}")


def build_by_name(
    kind: str,
    known: Mapping[str, Callable[..., T]],
    name: str,
    options: Mapping[str, float] | None = None,
) -> T:
    """Builds one of several things from its name and its options.

    Args:
        kind: What it is, for the messages: ``objective``.
        known: What builds it, by name.
        name: A key of ``known``.
        options: Its keyword arguments, such as ``{"beta": 0.1}``.

    Raises:
        ValueError: If the name or an option is unknown, or a value is out of range.
    """
    check_name(kind, name, known)
    accepted = set(inspect.signature(known[name]).parameters)
    unknown = sorted(set(options or {}) - accepted)
    if unknown:
        takes = f"it takes {', '.join(sorted(accepted))}" if accepted else "it takes none"
        raise ValueError(f"{kind} {name!r} has no option {', '.join(unknown)}; {takes}")
    return known[name](**(options or {}))


def first_of(names: Sequence[str]) -> str:
    """The first five of many names, for a message.

    Example:
        >>> first_of("abc"), first_of("abcdefg")
        ('a, b, c', 'a, b, c, d, e, ...')
    """
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
