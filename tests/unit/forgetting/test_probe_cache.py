"""Probes that runs share: found again bit for bit, and only where everything is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwf_lightning import FisherCallback
from lwf_lightning.data.batch import batches_of
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.files import locked
from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.forgetting.probe_cache import shared_probe

Make = Callable[..., Any]


class Asked:
    """Asks for a probe and counts how often one was computed."""

    def __init__(self, folder: Path, make_texts: Make) -> None:
        self.folder, self.texts, self.computed = folder, make_texts(6), 0

    def __call__(
        self, model: nn.Module, rate: float = 1e-2, texts: int = 6, **settings: Any
    ) -> dict[str, Tensor]:
        batches = list(batches_of(self.texts[:texts], 3, 0))

        def compute() -> dict[str, Tensor]:
            self.computed += 1
            return probe_anchor(model, batches, learning_rate=rate)

        settings |= {"learning_rate": rate}
        return shared_probe(self.folder, model, batches, settings, compute)


@pytest.fixture
def ask(tmp_path: Path, make_texts: Make) -> Asked:
    return Asked(tmp_path / "new" / "probes", make_texts)


def lora(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    wrapped: nn.Module = get_peft_model(model, LoraConfig(**options))  # type: ignore[arg-type]
    return wrapped


@pytest.mark.parametrize("wrap", [lambda model: model, lora])
def test_the_same_probe_is_loaded_bit_for_bit(ask: Asked, make_llama: Make, wrap: Make) -> None:
    first = ask(wrap(make_llama(tied=True)))
    again = ask(wrap(make_llama(tied=True)))
    assert ask.computed == 1
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert len(list(ask.folder.glob("*.safetensors"))) == 1


def test_another_probe_is_computed(ask: Asked, make_llama: Make) -> None:
    ask(make_llama())
    frozen = make_llama()
    frozen.lm_head.requires_grad_(False)
    for number, (model, options) in enumerate(
        [
            (make_llama(), {"rate": 2e-2}),
            (make_llama(), {"texts": 5}),
            (make_llama(), {"precision": "bf16-mixed"}),
            (make_llama(seed=1), {}),
            (frozen, {}),
            (lora(make_llama()), {}),
            (lora(make_llama(), lora_alpha=3), {}),
        ],
        start=2,
    ):
        ask(model, **options)
        assert ask.computed == number


@pytest.mark.parametrize("length", [0, 40, -1])
def test_a_damaged_file_is_named_and_replaced(ask: Asked, make_llama: Make, length: int) -> None:
    first = ask(make_llama())
    (file,) = ask.folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:length])
    with pytest.warns(UserWarning, match=f"{file.name}.*computed again and the file replaced"):
        again = ask(make_llama())
    assert ask.computed == 2
    assert file.read_bytes() == whole
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_nothing_is_left_of_a_probe_that_failed(ask: Asked, make_llama: Make) -> None:
    with pytest.raises(NonFiniteLossError, match="the probe's loss became"):
        ask(make_llama(), rate=float("inf"))
    assert not list(ask.folder.glob("*.safetensors"))
    ask(make_llama(), rate=1e-2)


def test_one_waits_for_another_that_is_at_it(ask: Asked, make_llama: Make) -> None:
    expected = ask(make_llama())
    (file,) = ask.folder.glob("*.safetensors")
    kept = file.with_suffix(".kept")
    file.rename(kept)
    found: list[dict[str, Tensor]] = []
    with locked(file.with_suffix(".lock")):  # as if another run were computing it
        waiting = threading.Thread(target=lambda: found.append(ask(make_llama())))
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
        kept.rename(file)
    waiting.join(timeout=60)
    assert ask.computed == 1
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


def test_runs_share_a_probe_and_choose_the_same(
    make_module: Make,
    make_data: Make,
    make_callback: Make,
    make_trainer: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scores(**options: Any) -> Tensor:
        callback = make_callback(save_tensors=False, **options)
        make_trainer(max_steps=1, callbacks=[callback]).fit(make_module(), make_data())
        assert callback.scores is not None
        return callback.scores.confidence

    alone, folder = scores(), str(tmp_path / "probes")
    torch.testing.assert_close(scores(probe_folder=folder), alone, rtol=0, atol=0)
    scores(probe_folder=folder, probe_learning_rate=2e-2)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the probe was computed again")

    monkeypatch.setattr("lwf_lightning.callbacks.fisher.probe_anchor", refuse)
    shared = scores(probe_folder=folder, forgetting_rate=0.5, estimator="empirical")
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)


def test_a_folder_without_a_probe_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor 'online' needs none"):
        FisherCallback("online", 3, probe_folder="probes")
