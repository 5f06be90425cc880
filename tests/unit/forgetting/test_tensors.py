from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lwf_lightning.forgetting import tensors
from lwf_lightning.forgetting.tensors import load_tensors, save_tensors


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    file = tmp_path / "t.safetensors"

    save_tensors(file, {"turned": matrix.T, "row": matrix[0]})

    loaded = load_tensors(file)
    torch.testing.assert_close(loaded["turned"], matrix.T)
    torch.testing.assert_close(loaded["row"], matrix[0])


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.safetensors"
    save_tensors(file, {"a": torch.ones(2)})

    def fail(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(file, {"a": torch.zeros(2)})

    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    torch.testing.assert_close(load_tensors(file)["a"], torch.ones(2))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_tensors(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    save_file({"a": torch.ones(100)}, cut)
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a whole safetensors file"):
        load_tensors(cut)


def test_a_file_of_another_model_is_named_with_the_parameter(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    model = nn.Linear(3, 2)
    save_tensors(file, {"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"t\.safetensors: the model's parameter bias is missing"):
        load_tensors(file, model=model)
    save_tensors(file, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    with pytest.raises(
        ValueError, match=r"weight has shape \(3, 2\), in the model it has \(2, 3\)"
    ):
        load_tensors(file, model=model)
    model.weight.requires_grad_(False)
    assert load_tensors(file, model=model).keys() == {"weight", "bias"}
