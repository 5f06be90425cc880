"""FisherCallback: its arguments, and its use with a foreign LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from lwf_lightning import FisherCallback
from lwf_lightning.data.batch import batches_of
from lwf_lightning.forgetting import (
    diagonal_fisher,
    forgetting_confidence,
    probe_anchor,
    select_forget_set,
)
from lwf_lightning.forgetting.weights import copy_weights, exchanged_weights
from lwf_lightning.losses import per_text_loss


class Foreign(L.LightningModule):
    """Somebody else's module, with automatic optimization."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def per_text_loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return per_text_loss(self.model, batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.per_text_loss(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    module: L.LightningModule, batches: Any, steps: int, *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    trainer = plain_trainer(steps, *callbacks, root=options.pop("root", None))
    trainer.fit(module, DataLoader(batches, batch_size=None), **options)
    return trainer


def plain_trainer(steps: int, *callbacks: L.Callback, root: Path | None = None) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        max_epochs=1 if steps == -1 else None,
        default_root_dir=root,
    )


def test_online_refreshes_in_a_foreign_module(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any], tmp_path: Path
) -> None:
    learn = list(batches_of(make_texts(12, seed=1), 3, 0))
    forget = list(batches_of(make_texts(7, seed=2), 3, 0))
    callback = FisherCallback(
        "online", 3, learning_batches=learn, forget_batches=forget, save_tensors=True
    )
    plain = Foreign(make_llama())
    fit(plain, learn, 4)
    base, module = copy_weights(make_llama()), Foreign(make_llama())
    fit(module, learn, 4, callback, root=tmp_path)

    # nothing about the training has changed, and the refresh came before the fourth step
    torch.testing.assert_close(
        copy_weights(module.model), copy_weights(plain.model), rtol=0, atol=0
    )
    assert callback.refreshed_at == 3
    assert module.calls > plain.calls  # its own loss was asked for

    by_hand = Foreign(make_llama())
    fit(by_hand, learn, 3)
    fisher = diagonal_fisher(by_hand.model, learn)
    with exchanged_weights(by_hand.model, base) as current:
        scores = forgetting_confidence(by_hand.model, forget, fisher=fisher, anchor=current)
        expected_anchor = {name: tensor.clone() for name, tensor in current.items()}
    torch.testing.assert_close(callback.scores.confidence, scores.confidence)
    assert callback.forget_set == select_forget_set(scores.confidence).tolist()

    kept_fisher, kept_anchor = callback.load_tensors()
    torch.testing.assert_close(kept_fisher, fisher)
    torch.testing.assert_close(kept_anchor, expected_anchor)


def test_probe_scores_once_before_the_first_step(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    learn = list(batches_of(make_texts(12, seed=1), 3, 0))
    forget = list(batches_of(make_texts(7, seed=2), 3, 0))
    callback = FisherCallback(
        learning_batches=learn,
        forget_batches=forget,
        probe_steps=5,
        probe_learning_rate=1e-2,
        save_tensors=False,
        alpha=2.0,
    )
    fit(Foreign(make_llama()), learn, 2, callback)
    assert callback.refreshed_at == 0
    model = make_llama()
    batches = [*learn, learn[0]]
    anchor = probe_anchor(model, batches, learning_rate=1e-2, text_loss=per_text_loss)
    with exchanged_weights(model, anchor):
        fisher = diagonal_fisher(model, learn)
    scores = forgetting_confidence(model, forget, fisher=fisher, anchor=anchor, alpha=2.0)
    torch.testing.assert_close(callback.scores.confidence, scores.confidence)
    with pytest.raises(ValueError, match="no Fisher was saved"):
        callback.load_tensors()


def test_the_state_loads_as_primitives_and_tensors(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any], tmp_path: Path
) -> None:
    learn = list(batches_of(make_texts(6, seed=1), 3, 0))
    options: dict[str, Any] = {"learning_batches": learn, "forget_batches": learn}
    callback = FisherCallback("online", 1, **options)
    fit(Foreign(make_llama()), learn, 2, callback, root=tmp_path)
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = FisherCallback("online", 1, **options)
    other.load_state_dict(state)
    assert other.forget_set == callback.forget_set
    torch.testing.assert_close(other.scores.confidence, callback.scores.confidence)
    torch.testing.assert_close(other.load_tensors(), callback.load_tensors())
    # the weights of Fisher and anchor are not in the checkpoint
    assert (tmp_path / "state.pt").stat().st_size < 5000

    Path(state["tensors_file"]).unlink()
    with pytest.warns(UserWarning, match=r"step-000001\.safetensors is gone"):
        other.load_state_dict(state)


def test_should_refresh_may_be_overridden(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    seen = []

    class Twice(FisherCallback):
        def should_refresh(self, step: int) -> bool:
            return step in (0, 2)

        def refresh(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.global_step)
            super().refresh(trainer, pl_module)

    learn = list(batches_of(make_texts(12, seed=1), 3, 0))
    callback = Twice("online", 99, learning_batches=learn, forget_batches=learn, save_tensors=False)
    fit(Foreign(make_llama()), learn, 4, callback)
    assert seen == [0, 2]
    assert callback.scores is not None
    assert math.isfinite(callback.scores.alpha)


class Manual(Foreign):
    """Takes three optimizer steps for each batch but the first, for which it takes two."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(3 if batch_idx else 2):
            optimizer.zero_grad()
            self.manual_backward(self.per_text_loss(batch).mean())
            optimizer.step()


def test_no_refresh_is_missed_where_a_batch_takes_several_steps(
    make_llama: Callable[..., Any],
    make_texts: Callable[..., Any],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    class Kept(FisherCallback):
        def refresh(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            super().refresh(trainer, pl_module)
            refreshed.append(trainer.global_step)
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    learn = list(batches_of(make_texts(18, seed=1), 3, 0))

    def refreshes(steps: int, interval: int, **options: Any) -> list[int]:
        refreshed.clear()
        callback = Kept(
            "online", interval, learning_batches=learn, forget_batches=learn, save_tensors=False
        )
        fit(Manual(make_llama()), learn, steps, callback, root=tmp_path, **options)
        return list(refreshed)

    refreshed: list[int] = []
    # the batches begin at 0, 2, 5, 8, 11 and 14
    assert refreshes(-1, 3) == [5, 8, 11, 14]
    assert refreshes(-1, 6) == [8, 14]
    assert refreshes(-1, 6, ckpt_path=tmp_path / "8.ckpt") == [14]
    assert refreshes(-1, 13) == [14]
    assert not [w for w in recwarn if "nothing will be forgotten: with" in str(w.message)]
    with pytest.warns(UserWarning, match="nothing will be forgotten: with"):
        assert refreshes(5, 5) == []


def test_a_refresh_after_the_end_is_warned_of_unless_the_timing_is_your_own(
    make_llama: Callable[..., Any],
    make_texts: Callable[..., Any],
    recwarn: pytest.WarningsRecorder,
) -> None:
    class First(FisherCallback):
        def should_refresh(self, step: int) -> bool:
            return step == 0

    learn = list(batches_of(make_texts(12, seed=1), 3, 0))
    for kind, warned in ((First, False), (FisherCallback, True)):
        callback = kind(
            "online", 2, learning_batches=learn, forget_batches=learn, save_tensors=False
        )
        fit(Foreign(make_llama()), learn, 2, callback)
        said = [str(warning.message) for warning in recwarn]
        assert any("nothing will be forgotten: with" in text for text in said) == warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "online"}, "anchor 'online' needs a refresh_interval"),
        ({"anchor": "probe", "refresh_interval": 5}, "leave out refresh_interval"),
        ({"anchor": "online", "refresh_interval": 0}, "refresh_interval must be at least 1, got 0"),
        ({"fisher_texts": 0}, "fisher_texts must be at least 1"),
        ({"probe_steps": -1}, "probe_steps must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"forgetting_rate": 0.0}, r"forgetting_rate must lie in \(0, 1\]"),
        ({"anchor": "Probe"}, "unknown anchor 'Probe'; choose one of probe, online"),
        ({"estimator": "exact"}, "unknown estimator 'exact'"),
        ({"reduction": "avg"}, "unknown reduction 'avg'"),
        ({"text_step": "units"}, "unknown text_step 'units'"),
        ({"strategy": "top"}, "unknown selection strategy 'top'"),
        ({"probe_learning_rate": 0.0}, "probe_learning_rate must be above 0"),
        ({"learning_batches": []}, "learning_batches holds no batch"),
        ({"forget_batches": []}, "forget_batches holds no batch"),
        ({"strategy": "threshold"}, "give `threshold` with strategy 'threshold'"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherCallback(**options)


def test_a_foreign_module_without_data_or_model_is_refused(
    make_llama: Callable[..., Any], make_texts: Callable[..., Any]
) -> None:
    learn = list(batches_of(make_texts(6, seed=1), 3, 0))
    with pytest.raises(ValueError, match="needs `learning_batches` and `forget_batches`"):
        fit(Foreign(make_llama()), learn, 1, FisherCallback())
    module = Foreign(make_llama())
    module.net = module.model
    del module.model
    with pytest.raises(TypeError, match="must hold its language model as `model`"):
        fit(module, learn, 1, FisherCallback(learning_batches=learn, forget_batches=learn))


def test_texts_of_ones_own_are_refused_with_a_module_that_unlearns_its_datamodules(
    make_module: Callable[..., Any],
    make_data: Callable[..., Any],
    make_trainer: Callable[..., Any],
    make_texts: Callable[..., Any],
) -> None:
    callback = FisherCallback(forget_batches=list(batches_of(make_texts(6), 1, 0)), probe_steps=1)
    data = make_data()
    with pytest.raises(ValueError, match=r"forget_batches .*leave them out"):
        make_trainer(callbacks=[callback]).fit(make_module(), data)
    assert data.self_knowledge is None


class Later(Foreign):
    """A module that makes its model ready in its own setup, which is after the callbacks'."""

    def __init__(self, model: torch.nn.Module, way: str) -> None:
        super().__init__(model)
        self.way = way

    def setup(self, stage: str) -> None:
        if self.way == "an adapter":
            torch.manual_seed(0)
            self.model = get_peft_model(self.model, LoraConfig(r=2, target_modules="all-linear"))
        elif self.way == "frozen in part":
            self.model.model.embed_tokens.requires_grad_(False)
        else:
            self.load_state_dict({name: w * 1.5 for name, w in self.state_dict().items()})


@pytest.mark.parametrize("way", ["an adapter", "frozen in part", "loaded"])
def test_the_base_weights_are_those_before_training_however_late_the_module_is_ready(
    way: str, make_llama: Callable[..., Any], make_texts: Callable[..., Any], tmp_path: Path
) -> None:
    learn = list(batches_of(make_texts(6, seed=1), 3, 0))
    base = Later(make_llama(), way)
    base.setup("fit")
    found = []

    def run(steps: int, **options: Any) -> L.Trainer:
        callback = FisherCallback(
            "online", 3, learning_batches=learn, forget_batches=learn, save_tensors=False
        )
        module = Later(make_llama(), way)
        trainer = fit(module, learn, steps, callback, root=tmp_path, **options)
        torch.testing.assert_close(callback._base_weights, copy_weights(base.model))
        assert not module._load_state_dict_pre_hooks
        found.append(callback.scores)
        return trainer

    run(4)
    run(2).save_checkpoint(tmp_path / "resumed.ckpt")
    run(4, ckpt_path=tmp_path / "resumed.ckpt")
    torch.testing.assert_close(found[2].confidence, found[0].confidence)


def lr_finder() -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=3, update_attr=False)


def batch_size_finder() -> BatchSizeFinder:
    return BatchSizeFinder(steps_per_trial=2, max_trials=1)


@pytest.mark.parametrize("finder", [lr_finder, batch_size_finder])
def test_the_base_weights_are_those_before_a_finder_has_trained(
    finder: Callable[[], L.Callback],
    make_llama: Callable[..., Any],
    make_texts: Callable[..., Any],
    tmp_path: Path,
) -> None:
    learn = list(batches_of(make_texts(12, seed=1), 3, 0))
    base = copy_weights(make_llama())
    data = L.LightningDataModule()
    data.batch_size = 1
    data.train_dataloader = lambda: DataLoader(learn, batch_size=None)

    def run(steps: int, *others: L.Callback, ckpt_path: Path | None = None) -> L.Trainer:
        callback = FisherCallback(
            "online", 2, learning_batches=learn, forget_batches=learn, save_tensors=False
        )
        module = Foreign(make_llama())
        trainer = plain_trainer(steps, callback, *others, root=tmp_path)
        if not others and ckpt_path is None:  # that of a fit comes after one for the finder alone
            Tuner(trainer).lr_find(module, datamodule=data, num_training=3, update_attr=False)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        torch.testing.assert_close(callback._base_weights, base, rtol=0, atol=0)
        assert not module._load_state_dict_pre_hooks
        return trainer

    run(2).save_checkpoint(tmp_path / "resumed.ckpt")
    run(3, finder())
    run(4, finder(), ckpt_path=tmp_path / "resumed.ckpt")
