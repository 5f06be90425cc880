from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lwf_lightning.errors import DamagedFileError
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

    def fail(content: object, path: Path, metadata: object) -> None:
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


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    written = {"a": torch.randn(9, 5), "b": torch.ones(3).bfloat16(), "c": torch.ones(())}
    save_tensors(file, written)
    content = file.read_bytes()
    torch.testing.assert_close(load_tensors(file), written, rtol=0, atol=0)
    for place in range(len(content)):
        if content[place : place + 1] == b" ":  # pads the header and says nothing
            continue
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(DamagedFileError, match=r"t\.safetensors"):
            load_tensors(file)


def test_a_file_without_a_sum_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DamagedFileError, match=r"other\.safetensors is damaged"):
        load_tensors(tmp_path / "other.safetensors")


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
