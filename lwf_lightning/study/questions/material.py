"""Texts to learn and to forget that ship with Python itself: prose, code and dialogue.

    python -m lwf_lightning.study.questions.material my_data

writes ``my_data/{prose,code,dialogue}/{train,validation,test}.jsonl``. A row is the beginning of a
text and four ways to go on: its own and those of three other texts, so that a run reports how often
its own is the most likely (chance 0.25) and the loss of it. Which texts there are depends on the
Python version; nothing else does.
"""

from __future__ import annotations

import argparse
import ast
import copy
import doctest
import importlib.util
import inspect
import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from lwf_lightning.files import whole_file

MODULES = (
    "_collections_abc", "_pydatetime", "_pydecimal", "abc", "argparse", "ast", "asyncio.tasks",
    "bisect", "calendar", "cmd", "codecs", "collections", "configparser", "contextlib", "csv",
    "dataclasses", "difflib", "doctest", "email.message", "enum", "filecmp", "fractions",
    "functools", "gettext", "gzip", "heapq", "http.client", "imaplib", "inspect", "ipaddress",
    "json.decoder", "json.encoder", "locale", "logging", "logging.handlers", "mailbox", "numbers",
    "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "pprint",
    "queue", "random", "reprlib", "sched", "shelve", "shutil", "smtplib", "socket", "socketserver",
    "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "traceback", "turtle", "types", "typing", "unittest.case",
    "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
CHOICES = 4
SPLITS = {"train": 256, "validation": 64, "test": 128}
_CHARACTERS = 120  # of a beginning, and of an end: about 30 tokens each
Pair = tuple[str, str]
"""The beginning of a text, and how it goes on."""


def prose() -> list[str]:
    """Paragraphs of documentation, in one line each."""
    found = []
    for tree in _trees():
        for text in _documentation(tree):
            for paragraph in text.split("\n\n"):
                line = " ".join(paragraph.split())
                words = line.replace("'", "").replace(",", "").rstrip(".").split()
                if len(words) >= 24 and sum(word.isalpha() for word in words) > 0.85 * len(words):
                    found.append(line)
    return list(dict.fromkeys(found))


def prose_pairs() -> list[Pair]:
    """Paragraphs cut at a word near their middle."""
    pairs = []
    for text in prose():
        text = text[: 2 * _CHARACTERS]
        place = text.rfind(" ", 0, len(text) // 2)
        pairs.append((text[:place], text[place + 1 :].rsplit(" ", 1)[0]))
    return pairs


def code_pairs() -> list[Pair]:
    """Functions without their documentation: their first lines, and those after them."""
    pairs = []
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.body:
                if ast.get_docstring(node) is not None:
                    node = copy.copy(node)
                    node.body = node.body[1:] or [ast.Pass()]
                lines = ast.unparse(node).splitlines()
                ends = [len("\n".join(lines[:count])) for count in range(1, len(lines))]
                if cut := sum(end <= _CHARACTERS for end in ends):
                    rest = "\n".join(lines[cut:]).strip()
                    pairs.append(("\n".join(lines[:cut]), rest[:_CHARACTERS]))
    return pairs


def dialogue_pairs() -> list[Pair]:
    """Interactive sessions: what is typed, after the turn before it, and the answer."""
    parser = doctest.DocTestParser()
    pairs = []
    for tree in _trees():
        for text in _documentation(tree):
            try:
                turns = parser.get_examples(text)
            except ValueError:  # a session that is none
                continue
            before = ""
            for turn in turns:
                asked = f"{before}>>> {turn.source.strip()}"[-_CHARACTERS:]
                if turn.want.strip():
                    pairs.append((asked, turn.want.strip()[:_CHARACTERS]))
                before = f">>> {turn.source.strip()}\n{turn.want}"[-_CHARACTERS:]
    return pairs


TASKS = {"prose": prose_pairs, "code": code_pairs, "dialogue": dialogue_pairs}


@cache
def _trees() -> list[ast.Module]:
    found = [importlib.util.find_spec(name) for name in MODULES]
    paths = [spec.origin for spec in found if spec is not None and spec.origin]
    return [
        ast.parse(Path(path).read_text(encoding="utf-8")) for path in paths if path.endswith(".py")
    ]


def _documentation(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield inspect.cleandoc(text)


def rows(pairs: Sequence[Pair], count: int, seed: int) -> list[dict[str, object]]:
    """Rows of a choice task, in random order.

    Args:
        pairs: Beginnings and ends; of equal beginnings, and of equal ends, the first counts.
        count: Most rows.
        seed: Of the order, of the other ends and of the place of the right one.
    """
    draw = random.Random(seed)
    unique = list({end: start for start, end in reversed(pairs) if start.strip() and end}.items())
    unique = list({start: (start, end) for end, start in unique}.values())
    draw.shuffle(unique)
    found = []
    for start, end in unique[:count]:
        others = draw.sample([other for _, other in unique if other != end], CHOICES - 1)
        label = draw.randrange(CHOICES)
        choices = [*others[:label], end, *others[label:]]
        found.append({"prompt": start, "choices": choices, "label": label})
    return found


def write_tasks(folder: Path, seed: int = 0) -> dict[str, dict[str, int]]:
    """Writes all tasks.

    Returns:
        Task -> split -> rows.
    """
    written: dict[str, dict[str, int]] = {}
    for task, pairs in TASKS.items():
        left = rows(pairs(), sum(SPLITS.values()), seed)
        written[task] = {}
        for split, count in SPLITS.items():
            part, left = left[:count], left[count:]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            with whole_file(folder / task / f"{split}.jsonl") as temporary:
                temporary.write_text(lines, encoding="utf-8")
            written[task][split] = len(part)
    return written


def main() -> None:
    """Writes the tasks into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for task, counts in write_tasks(options.folder, options.seed).items():
        print(task, ", ".join(f"{count} {split}" for split, count in counts.items()))  # noqa: T201


if __name__ == "__main__":
    main()
