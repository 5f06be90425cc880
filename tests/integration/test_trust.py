"""Nothing in a file that a user names is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lwf_lightning.cli import main
from lwf_lightning.errors import DamagedFileError

Make = Callable[..., Any]


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "it ran")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_a_checkpoint(
    way: str, trace: Path, make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.ckpt"
    content = {"state_dict": {}, "evil": Malicious(trace)}
    if way == "torch":
        torch.save(content, evil)
    else:
        evil.write_bytes(pickle.dumps(content))
    for stage in ("fit", "validate", "test", "predict"):
        call = getattr(make_trainer(limit_val_batches=1), stage)
        with pytest.raises(DamagedFileError, match=r"evil\.ckpt"):
            call(make_module(schedule="never"), datamodule=make_data(), ckpt_path=str(evil))
        with pytest.raises(ValueError, match="weights_only=False would run whatever code is in"):
            call(
                make_module(schedule="never"),
                datamodule=make_data(),
                ckpt_path=str(evil),
                weights_only=False,
            )
    assert not trace.exists()


def test_a_cache_of_self_knowledge(
    trace: Path, make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    data = make_data()
    make_trainer(max_steps=1, callbacks=[make_callback()]).fit(make_module(), data)
    (cache,) = Path(data.cache_dir).glob("*.jsonl")
    good = cache.read_bytes()
    cache.write_bytes(pickle.dumps({"texts": Malicious(trace)}))
    trainer = make_trainer(max_steps=1, callbacks=[make_callback()])
    with pytest.warns(UserWarning, match=rf"{cache.name} is damaged"):
        trainer.fit(make_module(), make_data())
    assert cache.read_bytes() == good
    assert not trace.exists()


def test_a_fisher_file(
    trace: Path, make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make
) -> None:
    callback = make_callback()
    make_trainer(max_steps=1, callbacks=[callback]).fit(make_module(), make_data())
    assert callback.tensors_file is not None
    Path(callback.tensors_file).write_bytes(pickle.dumps({"fisher/a": Malicious(trace)}))
    with pytest.raises(DamagedFileError, match=r"step-000000\.safetensors"):
        callback.load_tensors()
    assert not trace.exists()


def test_the_weights_of_a_local_model(
    trace: Path, model_folder: Path, make_module: Make, tmp_path: Path
) -> None:
    evil = tmp_path / "model"
    shutil.copytree(model_folder, evil)
    (evil / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Malicious(trace)}, evil / "pytorch_model.bin")
    module = type(make_module())(str(evil))
    with pytest.raises(DamagedFileError, match="model is not loaded: its weights are a pickle"):
        module.configure_model()
    assert not trace.exists()


def test_code_beside_a_local_model_needs_a_flag(
    trace: Path, model_folder: Path, make_module: Make, tmp_path: Path
) -> None:
    evil = tmp_path / "model"
    shutil.copytree(model_folder, evil)
    config = json.loads((evil / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()")
    module = type(make_module())(str(evil))
    with pytest.raises(ValueError, match="trust_remote_code"):
        module.configure_model()
    assert not trace.exists()


def test_a_yaml(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = tmp_path / "evil.yaml"
    path = f"!!python/object/apply:pathlib.Path [{trace}]"
    evil.write_text(f"seed_everything: !!python/object/apply:pathlib.Path.touch [{path}]\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(evil)])
    assert not trace.exists()
    error = capsys.readouterr().err
    assert "could not determine a constructor for the tag" in error
    assert f"in {evil}, line 1" in error
