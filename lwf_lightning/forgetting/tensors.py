"""Mappings from parameter name to tensor as files: Fisher information, anchors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lwf_lightning.errors import DamagedFileError
from lwf_lightning.files import whole_file


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as one safetensors file, whole or not at all, with a checksum in it.

    Args:
        path: The file; its folder is made, an earlier file is replaced.
        tensors: Any tensors by name.

    Raises:
        DiskFullError: If the disk is full; names the file.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(on_cpu, temporary, metadata={"sha256": checksum(sorted(on_cpu.items()))})


def load_tensors(path: str | Path, *, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Reads what :func:`save_tensors` wrote, to the CPU.

    Args:
        path: The file.
        model: If given, the tensors must be those of its trainable parameters.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If the file is damaged or was not written by :func:`save_tensors`; names
            it.
        ValueError: If it does not fit the model; the message names the file and the parameter.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("sha256")
            tensors: dict[str, Tensor] = {
                name: file.get_tensor(name) for name in sorted(file.keys())
            }
    except (SafetensorError, ValueError) as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error})") from error
    if written != checksum(sorted(tensors.items())):
        raise DamagedFileError(f"{path} is damaged: its sha256 is not the one inside")
    if model is not None:
        check_fit(tensors, model, what=str(path))
    return tensors


def check_fit(tensors: Mapping[str, Tensor], model: nn.Module, *, what: str) -> None:
    """Checks that there is a tensor of the right shape for every trainable parameter.

    Args:
        tensors: By parameter name; more than the model needs is no fault.
        model: The model.
        what: What the tensors are, for the message.

    Raises:
        ValueError: If one is missing or has another shape; the message names it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in tensors:
            raise ValueError(f"{what}: the model's parameter {name} is missing")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, "
                f"in the model it has {tuple(parameter.shape)}"
            )


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes, types and bytes, in the order given; one at a time on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(data))
    return digest.hexdigest()
