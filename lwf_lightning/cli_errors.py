"""Errors of the command line in one clear line: what is wrong, where, and the way out."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from opcode import opmap
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lwf_lightning.cli_help import fail

_PACKAGE = Path(__file__).parent
_LIGHTNING = Path(lightning.__file__).parent
_WORDS = {
    "NoneType": "null",
    "bool": "true or false",
    "dict": "names and values, as {a: 1}",
    "float": "a number",
    "int": "a whole number",
    "list": "a list, as [a, b]",
    "str": "a text",
}


class OneLineErrorParser(LightningArgumentParser):
    """A parser whose errors are a line and a tip, not two screens of usage."""

    _file: str | None = None

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a configuration; an error of YAML itself names the file."""
        self._file = str(path)
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self._file = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message and exits with status 2."""
        if not self.exit_on_error:  # an inner parser, one of several attempts
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        if self._file is not None:
            message = message.replace('"<unicode string>"', self._file)
        program = parser.prog.replace(" [options]", "")
        message = parser._with_suggestion(one_line(message))
        if found := re.match(
            r"the following arguments are required: (\w+)\.(?:data|model)", message
        ):
            message += ": name a file that has them, as --config configs/world.yaml"
            program += f" {found.group(1)}"
        if parser.prog.endswith(" study"):
            message += _way_into_a_study(message)
        fail(message, f"all options: {program} --help")

    def _with_suggestion(self, message: str) -> str:
        if found := re.search(r"unrecognized arguments: (--[\w.+-]+)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            return message + _meant(found.group(1), known)
        if found := re.search(r"does not accept option '([\w.]+)'", message):
            return message + _meant(found.group(1), [action.dest for action in self._actions])
        if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
            module, name = found.groups()
            return message + _meant(name, dir(import_module(module)))
        if found := re.search(r"class_path '([\w.]+)': Option '(\w+)' is not accepted", message):
            path, option = found.groups()
            where = message.split(":", 1)[0]
            meant = _meant(option, _options_of(path))
            ways = f"all: {where}.help {path}"
            if where == "--trainer.callbacks" and not meant:
                ways = (
                    "a flag goes to the last callback of the list; set the others' in the file; "
                    + ways
                )
            return f"{where}: {path} has no option {option!r}{meant} ({ways})"
        return message


def one_line(message: str) -> str:
    """Reduces a message of jsonargparse to its cause, after the flag that it belongs to."""
    body, flag = message, ""
    while True:
        body = body.strip()
        if found := re.match(r"Problem with given class_path '[\w.]+':\s*(?=Parser key)", body):
            body, flag = body[found.end() :], f"{flag}.init_args"
        elif found := re.match(r'Parser key "([\w.]+)":\s*', body):
            body, flag = body[found.end() :], f"{flag}.{found.group(1)}".lstrip(".")
        elif found := re.search(r"\n?( *)Errors:\n", body):
            # One item per type that was tried, and None among them says nothing.
            indent = found.group(1)
            errors = body[found.end() :].split(f"\n{indent}Given value type:", 1)[0]
            items = re.split(rf"(?:^|\n){indent}  - ", errors)
            telling = [item for item in items if item and not item.startswith("Expected a <class")]
            body = (telling or items)[0]
            if not telling:
                body = "expected " + " or ".join(_in_words(item) for item in items if item)
                body = body.replace(" or null", ", or null")
                break
        else:
            break
    body = " ".join(body.split()).removeprefix("Problem with given ")
    if found := re.fullmatch(r"(Expected a <class '\w+'>)\. Got value: (.*)", body):
        body = f"expected {_in_words(found.group(1))}, got {found.group(2)}"
    body = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", body)
    return f"--{flag}: {body}" if flag else body


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns errors raised on purpose, and missing files, into one line and exit status 1.

    Anything else, a defect, keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, LookupError) as error:
        deliberate = (
            isinstance(error, FileNotFoundError)
            or str(error).startswith("Does not validate")
            or (_raised_in(_PACKAGE, error) and not isinstance(error, (RuntimeError, LookupError)))
            or _said_by_lightning(error)
        )
        if not deliberate:
            raise
        message = error.args[0] if isinstance(error, KeyError) else error  # str() would quote it
        fail(one_line(str(message)), status=1)
    except MisconfigurationException as error:  # Lightning's own refusals
        message = " ".join(str(error).split())
        if re.match(r"No supported \w+ backend found|.*can not run on your system", message):
            message = (
                "trainer.accelerator: this machine has no such device; take cpu or auto "
                "(estimate reckons with --ranks for processes that need not be there)"
            )
        fail(message, status=1)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Prints a warning to the user as one line, without the source that gave it."""
    usual = warnings.formatwarning

    def plain(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if issubclass(category, UserWarning):
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _way_into_a_study(message: str) -> str:
    if message.startswith("the following arguments are required: name"):
        return ": name a file that has them, as --config configs/studies/world.yaml"
    if re.search(
        r"Option '(?:model|data|trainer|seed_everything)\b[\w.]*' is not accepted", message
    ):
        return (
            ": this is the configuration of a fit; a study names one as its base, beside methods, "
            "cells and seeds, as configs/studies/world.yaml does"
        )
    return ""


def _in_words(expected: str) -> str:
    """A type that jsonargparse names as Python does, as a user of YAML would say it."""
    found = re.match(r"Expected a <class '(\w+)'>", expected)
    return _WORDS.get(found.group(1), expected) if found else expected


def _meant(name: str, known: Sequence[str]) -> str:
    for close in get_close_matches(name, known, n=1):
        return f"; did you mean {close if close.startswith('-') else repr(close)}?"
    return ""


def _said_by_lightning(error: BaseException) -> bool:
    """Whether Lightning says, with whatever kind of error, what does not fit what it was given.

    What it says about code of one's own, called from there, needs the place in that code.
    """
    if isinstance(error, NotImplementedError) or not str(error):
        return False
    callers = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    inner = [name for name in callers if not _is_library(Path(name))]
    by_us = not inner or Path(inner[-1]).is_relative_to(_PACKAGE)
    return by_us and _raised_in(_LIGHTNING, error)


def _is_library(file: Path) -> bool:
    """Whether a file is Lightning's, or of Python's own library."""
    is_installed = "site-packages" in file.parts
    own = file.is_relative_to(_LIGHTNING) or file.is_relative_to(Path(torch.__file__).parent)
    return own or (file.is_relative_to(Path(inspect.__file__).parent) and not is_installed)


def _raised_in(package: Path, error: BaseException) -> bool:
    """Whether a ``raise`` of a package is behind it, and not what Python or torch found wrong."""
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    is_raise = code.co_code[place.tb_lasti] == opmap["RAISE_VARARGS"]
    return is_raise and Path(code.co_filename).is_relative_to(package)


def _options_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    loaded: Any = getattr(import_module(module), name)
    return list(inspect.signature(loaded).parameters)
