"""Files and folders that appear whole or not at all, and where cached ones lie."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lwf_lightning.errors import DiskFullError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}")


def cache_root() -> Path:
    """The folder for what can be rebuilt: ``$LWF_CACHE``, else ``lwf_lightning`` in the user's.

    The user's cache folder is ``$XDG_CACHE_HOME``, else ``~/.cache``.
    """
    if own := os.environ.get("LWF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lwf_lightning"


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without blank lines.

    A row ends at a newline and nowhere else: its texts may hold other line ends, such as U+2028.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


def _temporary_sibling(path: Path) -> Path:
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


@contextmanager
def whole_file(path: str | Path, *, replaces: bool = True) -> Iterator[Path]:
    """Writes a file whole or not at all, whatever ends the process or the machine.

    Args:
        path: The file to write; its folder is made, an earlier file is replaced at once.
        replaces: Whether it is; else of several processes that write the file only one does.

    Yields:
        A path in the same folder to write to. It takes the place of ``path`` when the block ends
        and is removed when the block raises.

    Raises:
        DiskFullError: If the disk is full; names ``path``.
        FileExistsError: If there is an earlier file, and ``replaces`` is False.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with whole_file(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole", encoding="utf-8")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        with full_disk_named(path):
            yield temporary
            _to_disk(temporary)  # else the new name could outlive a power cut, and not the content
            if replaces or not _linked(temporary, path):
                temporary.replace(path)
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Writes a folder whole or not at all.

    Args:
        path: The folder to write: absent or empty. Its parents are made.

    Yields:
        A new empty folder beside it. It becomes ``path`` when the block ends and is removed when
        the block raises.

    Raises:
        ValueError: If ``path`` exists and is not an empty folder, before or after the block.
        DiskFullError: If the disk is full; names ``path``.
    """
    path = Path(path)
    require_free(path)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        with full_disk_named(path):
            yield temporary
            for part in temporary.rglob("*"):
                _to_disk(part)
            require_free(path)
            temporary.replace(path)
            _to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file; the system lets go of it when the process ends, however it ends.

    Args:
        path: The lock file; it is made and stays.
        wait: Whether to wait for the lock; else an unavailable one is not taken.

    Yields:
        Whether the lock is held.
    """
    import fcntl  # not on Windows, where the rest of the package runs without it

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def require_free(folder: Path) -> None:
    """Raises ``ValueError`` unless the path is absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name another folder, or remove this one")


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """Turns whatever a full disk raises in the block into an error that names the file.

    Raises:
        DiskFullError: If the disk is full, the user's quota used up, or the file too large.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _says_no_space(error):
            raise
        raise DiskFullError(
            f"{path} could not be written, no space is left: free some. What was written before "
            "is whole; a fit goes on with the same command and --ckpt_path last"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in a folder and below; nothing may be writing there."""
    for path in sorted(folder.rglob(".*")):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _linked(file: Path, path: Path) -> bool:
    """Gives a file a second name that is free; False where the file system knows no such names."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        return False
    return True


def _to_disk(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _says_no_space(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        # safetensors is written in Rust: its errors carry the number in their text only
        if any(f"os error {number}" in str(error) for number in _NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False
