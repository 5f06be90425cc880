"""Checkpoints that are whole or absent, tell when they are damaged, and never run code."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from torch.utils._pytree import tree_map_only

from lwf_lightning.errors import DamagedFileError
from lwf_lightning.files import whole_file

# A zip file ends with the length of its comment and the comment: none, or a label and 64 digits.
_NO_COMMENT = struct.pack("<H", 0)
_SUMMED = struct.pack("<H", len(b"sha256:") + 64) + b"sha256:"
_BLOCK = 1 << 22


class WholeCheckpointIO(TorchCheckpointIO):
    """Saves and loads checkpoints; the default of :class:`~lwf_lightning.trainer.LWFTrainer`.

    A checkpoint is the file of ``torch.save``, with its own sha256 as the comment of the zip
    archive that it is: ``torch.load`` reads it everywhere, and the sum travels with the file.
    Paths that are not local are left to Lightning, but for ``weights_only``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint whole or not at all.

        Raises:
            DiskFullError: If the disk is full; names the file.
        """
        if not _is_local_file_protocol(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(path) as temporary, temporary.open("w+b") as file:
            summed = _SummedFile(file)
            torch.save(checkpoint, cast(IO[bytes], summed))
            file.seek(-len(_NO_COMMENT), io.SEEK_END)
            file.write(_SUMMED + summed.sha256.hexdigest().encode())

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint: tensors and primitives only.

        Raises:
            FileNotFoundError: If there is no such file.
            DamagedFileError: If the file is damaged or holds anything else; names the file.
            ValueError: If ``weights_only`` is False, or the checkpoint is a folder: FSDP2 saved
                it in shards, and reads it without this class.
        """
        if weights_only is False:
            raise ValueError(
                f"weights_only=False would run whatever code is in {path}: leave it out; "
                "checkpoints of this package need none"
            )
        if not _is_local_file_protocol(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder, as FSDP2 saves in shards: go on with the trainer.strategy it "
                "was made with, or make a model of it (python cli.py export) and take that"
            )
        if Path(path).is_file():
            check_whole(path)
        with refusal_named(path):
            return super().load_checkpoint(path, map_location, weights_only=True)


@contextmanager
def refusal_named(path: str | Path) -> Iterator[None]:
    """Names the file, and the class in it, for which torch refuses to load tensors and primitives.

    Raises:
        DamagedFileError: If torch refuses.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise DamagedFileError(
            f"{path} is not loaded: it holds more than tensors and primitives"
            f"{f' ({found.group(1)})' if found else ''}, which could run code, or it is no "
            "checkpoint"
        ) from error


def check_loads(checkpoint: Mapping[str, Any]) -> None:
    """Checks that what is to be saved would be loaded again: tensors and primitives only.

    Raises:
        TypeError: If there is anything else; names its place.
    """
    refused = _refused(tree_map_only(torch.Tensor, lambda _: None, dict(checkpoint)))
    if refused is not None:
        *place, value = refused
        raise TypeError(
            f"{'.'.join(place)} is a {type(value).__name__}, and a checkpoint holds tensors and "
            "primitives only, so that loading it runs no code: keep it as text or numbers there, "
            "or leave it out"
        )


def _refused(content: Any) -> tuple[Any, ...] | None:
    """The keys that lead to what would not be loaded, and it itself; None if all would be."""
    if _loads(content):
        return None
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        parts = content.items()
    elif isinstance(content, (list, tuple)):
        parts = enumerate(content)
    for key, value in parts:
        if (place := _refused(value)) is not None:
            return (str(key), *place)
    return (content,)


def _loads(content: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(content, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever an object raises that cannot be saved
        return False
    return True


def check_whole(path: str | Path) -> None:
    """Checks that a checkpoint is byte for byte what was written.

    One that Lightning alone wrote carries no sum; of it, the tensors and the structure are checked
    by the checksums of the zip format.

    Raises:
        DamagedFileError: If the file is cut short or altered, or no checkpoint at all.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - len(_SUMMED) - 64))
        end = file.read()
        if end.startswith(_SUMMED):
            if end[len(_SUMMED) :].decode("latin-1") != _sum(file, size - len(end)):
                raise DamagedFileError(f"{path} is damaged: its sha256 is not the one inside")
            return
    try:
        if end[-22:-18] != b"PK\x05\x06" or not end.endswith(_NO_COMMENT):
            raise zipfile.BadZipFile("its end is missing")
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as error:
        raise DamagedFileError(
            f"{path} is cut short, damaged or no checkpoint ({error})"
        ) from error
    if record is not None:
        raise DamagedFileError(f"{path} is damaged: the checksum of {record} is wrong")


def _sum(file: io.BufferedReader, end: int) -> str:
    """The sha256 of the archive as it was before the comment was added."""
    digest = hashlib.sha256()
    file.seek(0)
    left = end
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    digest.update(_NO_COMMENT)
    return digest.hexdigest()


class _SummedFile:
    """What ``torch.save`` writes to: passes it on and sums it up."""

    def __init__(self, file: io.BufferedRandom) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
