"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lwf_lightning.errors import DiskFullError
from lwf_lightning.files import (
    cache_root,
    json_lines,
    remove_leftovers,
    whole_file,
    whole_folder,
)
from lwf_lightning.forgetting.report import write_jsonl
from lwf_lightning.forgetting.tensors import save_tensors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_and_leaves_what_was_there(number: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("before")
    no_space = OSError(number, os.strerror(number))

    def half_a_file() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("aft")
            raise no_space

    def half_a_folder() -> None:
        with whole_folder(tmp_path / "exported") as folder:
            (folder / "part").write_text("half")
            raise RuntimeError("writer failed") from no_space

    with pytest.raises(DiskFullError, match=r"rows\.txt could not be written, no space is left"):
        half_a_file()
    with pytest.raises(DiskFullError, match=r"exported could not be written, no space is left"):
        half_a_folder()
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["rows.txt"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text("x")
            raise error

    with pytest.raises(PermissionError):
        fail(PermissionError(errno.EACCES, "no"))
    with pytest.raises(ValueError, match="what is this"):
        fail(ValueError("what is this"))
    assert not list(tmp_path.iterdir())


WRITERS = """
import resource, sys, torch
from pathlib import Path
from lwf_lightning.checkpoint_io import WholeCheckpointIO
from lwf_lightning.errors import DiskFullError
from lwf_lightning.forgetting.report import write_jsonl
from lwf_lightning.forgetting.tensors import save_tensors
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as if the disk were full from there
large = {"a": torch.zeros(10_000)}
for name, write in {
    "fisher.safetensors": lambda path: save_tensors(path, large),
    "one.ckpt": lambda path: WholeCheckpointIO().save_checkpoint(large, path),
    "scores.jsonl": lambda path: write_jsonl(path, [{"row": "x" * 100}] * 1_000),
}.items():
    try:
        write(folder / name)
    except DiskFullError as error:
        print(error)
"""


def test_what_a_real_limit_stops_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    save_tensors(tmp_path / "fisher.safetensors", {"a": torch.ones(3)})
    write_jsonl(tmp_path / "scores.jsonl", [{"row": 1}])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for name, line in zip(["fisher.safetensors", "one.ckpt", "scores.jsonl"], lines, strict=True):
        assert line.startswith(f"{tmp_path / name} could not be written, no space is left")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from lwf_lightning.files import whole_file\n"
        "with whole_file(sys.argv[1]) as file:\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "one.ckpt")], timeout=60, check=False
    )
    (tmp_path / ".gitignore").touch()
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / "one.ckpt").exists()
    (tmp_path / "below" / ".model.0123456789ab" / "half").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {".gitignore", "below"}


def test_whole_file_replaces_at_once_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"

    def write(text: str, then: Callable[[], None]) -> None:
        with whole_file(file) as temporary:
            temporary.write_text(text)
            then()

    write("one", then=lambda: None)
    with pytest.raises(ZeroDivisionError):
        write("half", then=lambda: 1 / 0)
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_whole_folder_loses_against_a_faster_process(tmp_path: Path) -> None:
    def write(name: str, then: Callable[[], None]) -> None:
        with whole_folder(tmp_path / "model") as temporary:
            (temporary / name).touch()
            then()

    with pytest.raises(ValueError, match="exists already"):
        write("mine", then=lambda: write("theirs", then=lambda: None))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["theirs"]


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWF_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user")
    assert cache_root() == Path("/own")
    monkeypatch.delenv("LWF_CACHE")
    assert cache_root() == Path("/user/lwf_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_root() == Path("/home/somebody/.cache/lwf_lightning")


def test_rows_end_at_newlines_only(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\u2029three\x85four"}, {"text": "five\r\n"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert json_lines(tmp_path / "rows.jsonl") == rows
