from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from lwf_lightning.errors import DamagedFileError
from lwf_lightning.fsdp2 import check_sharded, load_checkpoint_weights

Make = Callable[..., Any]


class Malicious:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def saved(model: nn.Module, folder: Path, extra: Any = 1) -> Path:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save({"state_dict": state, "extra": extra}, checkpoint_id=folder, no_dist=True)
    torch.save({"step": 3}, folder / "meta.pt")
    return folder


def test_weights_come_from_a_folder_of_shards_as_from_a_file(
    make_llama: Make, tmp_path: Path
) -> None:
    model = make_llama(seed=1, tied=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "file.ckpt")
    folder = saved(model, tmp_path / "folder.ckpt")
    check_sharded(folder)
    for checkpoint in (tmp_path / "file.ckpt", folder):
        other = make_llama(seed=2, tied=True)
        load_checkpoint_weights(other, checkpoint)
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_another_models_checkpoint_is_refused(make_llama: Make, tmp_path: Path) -> None:
    model, other = make_llama(layers=1), make_llama(layers=2)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "file")
    for checkpoint in (tmp_path / "file", saved(model, tmp_path / "folder")):
        with pytest.raises(ValueError, match=r"another model: model\.model\.layers\.1\."):
            load_checkpoint_weights(other, checkpoint)


@pytest.mark.parametrize("place", [".metadata", "meta.pt", "shards"])
def test_nothing_in_a_sharded_checkpoint_runs(make_llama: Make, tmp_path: Path, place: str) -> None:
    malicious = Malicious(tmp_path / "trace")
    folder = saved(make_llama(), tmp_path / "c.ckpt", malicious if place == "shards" else 1)
    if place != "shards":
        (folder / place).write_bytes(pickle.dumps(malicious))
    with pytest.raises(DamagedFileError, match="could run code"):
        check_sharded(folder)
    with pytest.raises(DamagedFileError, match="could run code"):
        load_checkpoint_weights(make_llama(), folder)
    assert not (tmp_path / "trace").exists()


def test_an_index_reaches_nothing_that_its_classes_module_imports(tmp_path: Path) -> None:
    module = b"ctorch.distributed.checkpoint.metadata\n"
    (tmp_path / ".metadata").write_bytes(module + b"__builtins__\nS'planted'\nI1\ns.")
    with pytest.raises(DamagedFileError, match="could run code"):
        check_sharded(tmp_path)
    assert not hasattr(builtins, "planted")


class Written:
    """Is written as a look-up of an attribute."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_an_index_may_look_up_memory_formats_alone(make_llama: Make, tmp_path: Path) -> None:
    """Python 3.11.2 writes a member of an enumeration so."""
    contiguous = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    index = saved(make_llama(), tmp_path / "c.ckpt") / ".metadata"
    content = pickle.loads(index.read_bytes())
    for entry in content.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.size = (contiguous, Written(_MEM_FORMAT_ENCODING, contiguous.name))
    index.write_bytes(pickle.dumps(content))
    read = check_sharded(index.parent).state_dict_metadata["state_dict.model.lm_head.weight"]
    assert isinstance(read, TensorStorageMetadata)
    assert read.size == (contiguous, contiguous)
    content.planner_data = Written(Path, "touch")
    index.write_bytes(pickle.dumps(content))
    with pytest.raises(DamagedFileError, match="could run code"):
        check_sharded(index.parent)


def test_a_file_without_a_state_dict_is_no_checkpoint(make_llama: Make, tmp_path: Path) -> None:
    torch.save(make_llama().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is not a checkpoint of Lightning"):
        load_checkpoint_weights(make_llama(), tmp_path / "weights.pt")


def test_a_sharded_checkpoint_that_is_cut_short_is_named(make_llama: Make, tmp_path: Path) -> None:
    for name in (".metadata", "meta.pt", "__0_0.distcp"):
        folder = saved(make_llama(), tmp_path / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DamagedFileError, match=name):
            check_sharded(folder)
        (folder / name).unlink()
        with pytest.raises(DamagedFileError, match=name):
            check_sharded(folder)
