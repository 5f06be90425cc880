"""Mappings from parameter name to tensor as files: Fisher information, anchors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lwf_lightning.files import whole_file


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as one safetensors file, whole or not at all.

    Args:
        path: The file; its folder is made, an earlier file is replaced.
        tensors: Any tensors by name.
    """
    with whole_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def load_tensors(path: str | Path, *, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Reads what :func:`save_tensors` wrote, to the CPU.

    Args:
        path: The file.
        model: If given, the tensors must be those of its trainable parameters.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or does not fit the model; the message names the file
            and the parameter.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
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
