"""FSDP2: a model cut into shards, and whole again: in memory, and from a checkpoint on disk."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lwf_lightning.checkpoint_io import WholeCheckpointIO
from lwf_lightning.errors import DamagedFileError
from lwf_lightning.generation import unwrapped

# Of a sharded checkpoint: where in its files each tensor lies, and what is no tensor of the model.
_INDEX, _REST = ".metadata", "meta.pt"
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, KeyError, RuntimeError),
    *(FileNotFoundError, NotADirectoryError),
)


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts a model's parameters into shards, in place: each block by itself, then the rest.

    Every process must hold the same weights. Optimizers are built afterwards.

    Args:
        model: A ``transformers`` causal LM, with or without a LoRA adapter.
        mesh: The processes, in one dimension.
    """
    base: Any = unwrapped(model)
    for block in _blocks(base):
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh)
    if base is not model:
        # PEFT calls base.forward itself, past the hooks by which FSDP2 makes the root whole.
        model.base_model.forward = base.__call__  # type: ignore[union-attr]


def _blocks(model: Any) -> Iterator[nn.Module]:
    """The repeated blocks of a ``transformers`` model, inner ones first."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = set(model._no_split_modules or ())  # of code that came with a Hub model
    for module in reversed(list(model.modules())):
        if isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names:
            yield module


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's weights, gathered in main memory on rank 0; empty on the other ranks."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )  # type: ignore[return-value]


def load_checkpoint_weights(model: nn.Module, path: str | Path, *, prefix: str = "model.") -> None:
    """Reads the weights of a checkpoint of Lightning, one file or a folder of shards.

    Args:
        model: A whole model in main memory; its weights are overwritten.
        path: The checkpoint.
        prefix: What the checkpoint puts before the model's names.

    Raises:
        ValueError: If it is no checkpoint, or one of another model.
        DamagedFileError: If it holds more than tensors and primitives.
    """
    path = Path(path)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    if path.is_dir():
        index = check_sharded(path).state_dict_metadata
        start = "state_dict."
        found = {
            key.removeprefix(start): entry.size
            for key, entry in index.items()
            if key.startswith(start) and isinstance(entry, TensorStorageMetadata)
        }
        _check_names(state, found, path)
        load({"state_dict": state}, storage_reader=FileSystemReader(path), no_dist=True)
    else:
        saved = WholeCheckpointIO().load_checkpoint(path).get("state_dict")
        if not isinstance(saved, Mapping):
            raise ValueError(f"{path} is not a checkpoint of Lightning: it has no state_dict")
        _check_names(state, {name: tensor.shape for name, tensor in saved.items()}, path)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(saved[name])


def _check_names(state: Mapping[str, Tensor], found: Mapping[str, torch.Size], path: Path) -> None:
    wanted = {name: tensor.shape for name, tensor in state.items()}
    odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if odd:
        raise ValueError(f"{path} is a checkpoint of another model: {odd[0]} is not the same")


# By name: a module holds what it imports as well, its builtins among it.
_OF_AN_INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath"),
}


def _memory_format(kind: Any, name: str) -> _MEM_FORMAT_ENCODING:
    """Stands for the ``getattr`` by which Python 3.11.2 writes a member of an enumeration."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"getattr of {kind}")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    """Makes what the index of a sharded checkpoint is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuses any other class or function."""
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in _OF_AN_INDEX.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def check_sharded(path: str | Path) -> Metadata:
    """Checks that a sharded checkpoint is complete and holds nothing that runs.

    torch would unpickle its index and its primitives whatever they are; its tensors it would not.

    Returns:
        The index.

    Raises:
        DamagedFileError: If something is missing or cut short, or holds more than tensors and
            primitives; names the file.
    """
    file = Path(path) / _INDEX
    try:
        with file.open("rb") as stream:
            index: Metadata = _Unpickler(stream).load()
        for place in index.storage_data.values():
            file = Path(path) / place.relative_path
            if file.stat().st_size < place.offset + place.length:
                raise EOFError("it is cut short")
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                place = index.storage_data[MetadataIndex(name)]
                file = Path(path) / place.relative_path
                with file.open("rb") as stream:
                    stream.seek(place.offset)
                    torch.load(io.BytesIO(stream.read(place.length)), weights_only=True)
        file = Path(path) / _REST
        torch.load(file, weights_only=True, map_location="cpu")
    except _DAMAGE as error:
        raise DamagedFileError(
            f"{file} is not loaded: it is missing, cut short, damaged, or holds more than tensors "
            "and primitives, which could run code"
        ) from error
    return index
