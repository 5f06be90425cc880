from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest

from lwf_lightning.cli import LWFCLI, _is_no_advertisement, _quieten_lightning
from lwf_lightning.cli_help import SUBCOMMANDS, answer_at_once, help_text

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_real_command_lines() -> None:
    assert list(SUBCOMMANDS) == [*LWFCLI.subcommands(), "study"]


def test_the_help_fits_a_terminal_and_names_files_that_exist() -> None:
    lines = help_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in SUBCOMMANDS)
    configs = set(re.findall(r"configs/\w+\.yaml", help_text()))
    assert configs
    assert all((ROOT / config).is_file() for config in configs)


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["--help"], 0, help_text(), ""),
        (["-h"], 0, help_text(), ""),
        ([], 2, "", help_text()),
        (["scor"], 2, "", "error: there is no subcommand 'scor'; did you mean 'score'?\n"),
        (["forget", "--config", "x"], 2, "", "error: there is no subcommand 'forget'\n"),
    ],
)
def test_answers(
    arguments: list[str], status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        answer_at_once(arguments)
    assert left.value.code == status
    captured = capsys.readouterr()
    assert captured.out == out
    assert captured.err.startswith(err)


@pytest.mark.parametrize(
    "arguments",
    [["fit"], ["fit", "--help"], ["--config", "a.yaml", "fit"], ["--print_config"], ["estimate"]],
)
def test_all_else_is_left_to_lightning(arguments: list[str]) -> None:
    answer_at_once(arguments)


@pytest.mark.parametrize("argument", ["--help", "fitt"])
def test_nothing_heavy_is_imported_for_it(argument: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['cli.py', {argument!r}]\n"
        "try: runpy.run_path('cli.py', run_name='__main__')\n"
        "finally: print({'torch', 'lightning', 'jsonargparse'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.fixture
def lightnings_log() -> Iterator[list[str]]:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.removeFilter(_is_no_advertisement)  # an earlier test may have run a command line
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    with warnings.catch_warnings():
        yield lines
    logger.removeHandler(handler)
    logger.removeFilter(_is_no_advertisement)


def test_the_log_is_free_of_advertisements(lightnings_log: list[str]) -> None:
    L.Trainer(accelerator="cpu", logger=False)
    assert any("Tip" in line for line in lightnings_log)
    before = len(lightnings_log)
    lightnings_log.clear()
    _quieten_lightning()
    L.Trainer(accelerator="cpu", logger=False)
    assert not any("Tip" in line for line in lightnings_log)
    assert 0 < len(lightnings_log) < before  # the rest is there
