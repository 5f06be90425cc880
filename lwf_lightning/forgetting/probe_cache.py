"""Probes that runs share on disk: one that was computed before is loaded."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import Batch
from lwf_lightning.errors import DamagedFileError
from lwf_lightning.files import locked
from lwf_lightning.forgetting.elicit import comparable_config
from lwf_lightning.forgetting.tensors import checksum, load_tensors, save_tensors
from lwf_lightning.forgetting.weights import trainable_parameters
from lwf_lightning.generation import unwrapped
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import sharded_like, whole

_FORMAT = 2  # of how a probe is made: a new number leaves old files unread


def shared_probe(
    folder: str | Path,
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Mapping[str, Any],
    compute: Callable[[], dict[str, Tensor]],
    *,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """The probe of a model, from ``<folder>/<fingerprint>.safetensors`` if it is there.

    The fingerprint is that of all weights, architecture and adapter, the names of what trains, the
    batches, the settings and the number of processes. Where two runs want the same probe at once,
    one waits for the other. A damaged file is named in a warning, computed again and replaced.
    With dropout, the probe of whoever came first is everyone's.

    Args:
        folder: Where probes are kept, each as large as what trains of the model.
        model: The model, holding the base weights.
        batches: The probe's batches, all of them on every process.
        settings: What else decides the result, such as its learning rate: primitives by name.
        compute: Computes the probe; called by all processes or by none.
        ranks: The processes; the first one reads and writes. By default this process is alone.

    Returns:
        What ``compute`` returns or once returned, bit for bit.
    """
    ranks = ranks or Ranks()
    name = f"{_fingerprint(model, batches, settings, ranks)}.safetensors"
    file = Path(folder).expanduser() / name
    with locked(file.with_suffix(".lock")) if ranks.is_first else nullcontext():
        known = _read(file, model) if ranks.is_first else None
        if ranks.from_first(lambda: known is not None):
            return _spread(known, model, ranks)
        probed = compute()
        # Gathered by all ranks together, one tensor at a time, and kept by the first.
        gathered = ((name, whole(tensor)) for name, tensor in probed.items())
        on_cpu = {name: tensor.cpu() for name, tensor in gathered if ranks.is_first}
        if ranks.is_first:
            save_tensors(file, on_cpu)
        return probed


@torch.no_grad()
def _fingerprint(
    model: nn.Module, batches: Sequence[Batch], settings: Mapping[str, Any], ranks: Ranks
) -> str:
    base: Any = unwrapped(model)
    adapters = {
        name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()
    }
    content = {
        "format": _FORMAT,
        "config": comparable_config(base),
        "adapters": adapters,
        "trainable": sorted(trainable_parameters(model)),
        "settings": dict(settings),
        "processes": ranks.world_size,
        "weights": checksum((n, whole(t)) for n, t in sorted(model.state_dict().items())),
        "batches": checksum(
            (f"{step} {key}", batch[key])
            for step, batch in enumerate(batches)
            for key in sorted(batch)
        ),
    }
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: object) -> object:
    """Sets in a fixed order, which theirs is not from process to process."""
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _read(file: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """What the file holds; None if there is none, or (with a warning) a damaged one."""
    if not file.exists():
        return None
    try:
        return load_tensors(file, model=model)
    except (DamagedFileError, ValueError) as error:
        warnings.warn(f"{error}: the probe is computed again and the file replaced", stacklevel=3)
        return None


def _spread(
    known: Mapping[str, Tensor] | None, model: nn.Module, ranks: Ranks
) -> dict[str, Tensor]:
    """Gives every process what the first one read, each its shard of it; one tensor at a time."""
    probed = {}
    for name, parameter in trainable_parameters(model).items():
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if known is not None:
            tensor.copy_(known[name])
        ranks.copy_first([tensor])
        probed[name] = sharded_like(tensor, parameter)
    return probed
