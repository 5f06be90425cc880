"""Exported models load back equal; an export is whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from lwf_lightning.models import export_model, load_model, load_tokenizer

Make = Callable[..., Any]
INPUT = torch.tensor([[5, 9, 11, 7], [3, 4, 36, 2]])


def adapter(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **changes})


def logits(model: Any) -> torch.Tensor:
    return model.eval()(INPUT).logits


def test_an_exported_model_loads_back_equal(folder: Path, tmp_path: Path, take_steps: Make) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    take_steps(model)
    export_model(model, tokenizer, tmp_path / "runs" / "out")
    assert model.training
    loaded = load_model(tmp_path / "runs" / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert load_tokenizer(tmp_path / "runs" / "out").get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "runs" / "out" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (adapter(), False),
        (adapter(), True),
        (adapter(use_dora=True), False),
        (adapter(modules_to_save=["lm_head"]), False),
        (adapter(target_modules=["embed_tokens", "v_proj"]), False),
        (adapter(target_modules=["embed_tokens", "v_proj"]), True),
        (adapter(target_modules=["lm_head", "v_proj"]), True),
        (adapter(target_modules=["lm_head", "embed_tokens"]), True),
    ],
    ids=["plain", "tied", "dora", "modules_to_save", "embedding", "tied_in", "tied_out", "both"],
)
def test_an_exported_adapter_loads_back_equal(
    make_llama: Callable[..., Any],
    tmp_path: Path,
    config: LoraConfig,
    tied: bool,
    save_tokenizer: Make,
    take_steps: Make,
) -> None:
    make_llama(tied=tied).save_pretrained(tmp_path / "base")
    tokenizer = save_tokenizer(tmp_path / "base", eos_token="<eos>")
    model = load_model(tmp_path / "base", lora=config, gradient_checkpointing=True)
    take_steps(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    kinds = [type(module) for module in model.modules()]

    export_model(model, tokenizer, tmp_path / "out")

    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == kinds
    expected = logits(model)
    assert not torch.allclose(expected, logits(load_model(tmp_path / "base")))
    merged = load_model(tmp_path / "out" / "merged")
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert torch.equal(logits(again), expected)
    for part in ("adapter", "merged"):
        assert load_tokenizer_files(tmp_path / "out" / part)
    model.train()
    take_steps(model)  # it can still be trained


def load_tokenizer_files(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()


def test_the_adapter_alone(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, lora=adapter())
    export_model(model, load_tokenizer(folder), tmp_path / "out", merge=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


def test_a_folder_in_use_is_not_touched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_model(load_model(folder), load_tokenizer(folder), tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match=r"out exists already: name another folder"):
        export_model(load_model(folder), load_tokenizer(folder), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_failed_export_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        export_model(model, tokenizer, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
