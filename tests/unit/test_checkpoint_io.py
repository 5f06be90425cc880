"""Checkpoints on disk: whole or absent, damage is seen, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import random
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lwf_lightning.checkpoint_io import WholeCheckpointIO, check_loads, check_whole
from lwf_lightning.errors import DamagedFileError, DiskFullError
from lwf_lightning.runs import run_state


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "it ran")


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(100, 7, generator=generator), "b": torch.tensor(3)}
    return {"state_dict": tensors, "step": 3, "names": ["x", "y"]}


@pytest.mark.parametrize("io", [WholeCheckpointIO(), TorchCheckpointIO()])
def test_what_was_saved_is_loaded_by_us_by_lightning_and_by_torch(
    io: TorchCheckpointIO, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "one.ckpt"
    io.save_checkpoint(checkpoint, path)
    assert [file.name for file in path.parent.iterdir()] == ["one.ckpt"]
    check_whole(path)
    for loaded in (
        WholeCheckpointIO().load_checkpoint(path),
        TorchCheckpointIO().load_checkpoint(path),
        torch.load(path, weights_only=True, mmap=True),
    ):
        torch.testing.assert_close(loaded["state_dict"], checkpoint["state_dict"], rtol=0, atol=0)
        assert loaded["step"] == 3


def test_every_flipped_bit_is_seen(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint, path)
    content = path.read_bytes()
    draw = random.Random(0)
    ends = range(len(content) - 100, len(content))
    for place in [0, *ends, *draw.sample(range(len(content)), 300)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"one\.ckpt"):
            check_whole(path)


def test_every_truncation_is_seen(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint, path)
    content = path.read_bytes()
    for length in [0, 1, 71, len(content) // 2, *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=r"one\.ckpt"):
            WholeCheckpointIO().load_checkpoint(path)


def test_a_flipped_weight_of_lightnings_own_checkpoint_is_seen(
    checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "one.ckpt"
    TorchCheckpointIO().save_checkpoint(checkpoint, path)
    content = path.read_bytes()
    place = content.index(checkpoint["state_dict"]["a"].numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DamagedFileError, match=r"the checksum of .* is wrong"):
        WholeCheckpointIO().load_checkpoint(path)


def test_the_shards_of_several_processes_are_not_for_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder, as FSDP2 saves in shards: go on with"):
        WholeCheckpointIO().load_checkpoint(tmp_path)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_a_malicious_checkpoint_runs_nothing(way: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    content = {"state_dict": {}, "evil": Malicious(trace)}
    if way == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(DamagedFileError, match=r"evil\.ckpt"):
        WholeCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match=r"would run whatever code is in .*evil\.ckpt"):
        WholeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # what was fed does write when it is let
    assert trace.exists()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Path("x"), r"a\.deep\.1 is a PosixPath"),
        (Enum("Kind", "ONE").ONE, r"a\.deep\.1 is a Kind"),
        (lambda: 1, r"a\.deep\.1 is a function"),
    ],
)
def test_what_would_not_be_loaded_again_is_refused_by_its_place(value: Any, what: str) -> None:
    state = {"weights": torch.ones(3), "names": {"x"}, "steps": (1, 2.0, None)}
    check_loads({"state_dict": state, "a": {"deep": [torch.ones(2), "text"]}})
    with pytest.raises(TypeError, match=what):
        check_loads({"state_dict": state, "a": {"deep": [torch.ones(2), value]}})


def test_a_checkpoint_with_an_object_in_it_is_named_with_the_class(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.ckpt"
    WholeCheckpointIO().save_checkpoint({"hyper_parameters": {"folder": Path("x")}}, path)
    for load in (WholeCheckpointIO().load_checkpoint, run_state):
        with pytest.raises(DamagedFileError, match=r"step-000001\.ckpt .*\(pathlib\.\w+\)"):
            load(path)


@pytest.mark.parametrize("writes", [0, 3, 20])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    writes: int, checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint(checkpoint, path)
    left = writes

    def write(self: Any, data: Any) -> int:
        nonlocal left
        if left == 0:
            raise OSError(28, os.strerror(28))
        left -= 1
        return len(data)

    monkeypatch.setattr("lwf_lightning.checkpoint_io._SummedFile.write", write)
    with pytest.raises(DiskFullError, match=r"one\.ckpt could not be written, no space is left"):
        io.save_checkpoint({"step": 4, "state_dict": {"a": torch.zeros(5)}}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["one.ckpt"]
    assert io.load_checkpoint(path)["step"] == 3
