"""Files and folders that appear whole or not at all, and where cached ones lie."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """The folder for what can be rebuilt: ``$LWF_CACHE``, else ``lwf_lightning`` in the user's.

    The user's cache folder is ``$XDG_CACHE_HOME``, else ``~/.cache``.
    """
    if own := os.environ.get("LWF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lwf_lightning"


def _temporary_sibling(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Writes a file whole or not at all.

    Args:
        path: The file to write; its folder is made, an earlier file is replaced at once.

    Yields:
        A path in the same folder to write to. It takes the place of ``path`` when the block ends
        and is removed when the block raises.

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
        yield temporary
        temporary.replace(path)
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
    """
    path = Path(path)
    require_free(path)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        require_free(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(folder: Path) -> None:
    """Raises ``ValueError`` unless the path is absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name another folder, or remove this one")
