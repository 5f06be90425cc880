"""AscentGuard in whole fits: an absurd ascent is survived, a healthy one is left alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lwf_lightning import AscentGuard
from lwf_lightning.callbacks.guard_signals import GuardSignals
from lwf_lightning.data.batch import IGNORE_INDEX, collate
from lwf_lightning.losses import per_text_loss

Make = Callable[..., Any]


def absurd(**options: Any) -> dict[str, Any]:
    return {"unlearning_scale": 1000.0, "unlearning_ceiling": 1e9} | options


@pytest.fixture
def fit(
    make_module: Make, make_data: Make, make_trainer: Make, make_callback: Make, make_recorder: Make
) -> Make:
    """Runs 16 learning steps; returns the trainer, the module and the recorder."""

    def run(
        guard: AscentGuard | None, module: dict[str, Any], **options: Any
    ) -> tuple[Any, Any, Any]:
        model, recorder = make_module(**module), make_recorder()
        callbacks = [make_callback(save_tensors=False), recorder, *([guard] if guard else [])]
        defaults = {"max_steps": 16, "limit_val_batches": 1.0, "check_val_every_n_epoch": 1}
        ckpt_path = options.pop("ckpt_path", None)
        callbacks += options.pop("callbacks", [])
        trainer = make_trainer(callbacks=callbacks, ascent_guard=False, **(defaults | options))
        trainer.fit(model, make_data(), ckpt_path=ckpt_path)
        return trainer, model, recorder

    return run


def loss(module: Any) -> float:
    """Loss on the learning texts; the random validation texts of this task cannot be learned."""
    data = module.trainer.datamodule
    with torch.no_grad():
        return float(per_text_loss(module.model, collate(data.learning_encoded, 0)).mean())


def test_without_a_guard_an_absurd_ascent_destroys_the_run(fit: Make) -> None:
    _, vanilla, _ = fit(None, {"schedule": "never"})
    _, ruined, _ = fit(None, absurd())
    assert loss(ruined) > 3 * loss(vanilla)


@pytest.mark.parametrize("schedule", ["periodic", "ahead", "front_loaded", "random"])
def test_with_the_guard_an_absurd_ascent_leaves_the_learning_task_intact(
    schedule: str, fit: Make
) -> None:
    _, vanilla, _ = fit(None, {"schedule": "never"})
    guard = AscentGuard()
    _, module, _ = fit(guard, absurd(schedule=schedule, ahead_steps=3))
    assert loss(module) < 1.15 * loss(vanilla)
    assert guard.state.undone > 0
    assert guard.scale <= 0.1
    assert module.unlearning_steps >= guard.state.undone
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


def test_an_undone_step_leaves_no_trace_in_weights_and_learning(fit: Make) -> None:
    _, _, plain = fit(None, {"schedule": "never"})
    guard = AscentGuard(damping=0.999, max_undone=3)  # every step stays absurd
    _, module, guarded = fit(guard, absurd())
    torch.testing.assert_close(guarded.weights, plain.weights, rtol=0, atol=0)
    assert [row["action"] for row in guard.state.records] == [
        "undo and damp",
        "undo and damp",
        "stop",
    ]
    assert module.unlearning_steps == 3


def test_a_healthy_run_is_bit_for_bit_the_run_without_a_guard(fit: Make) -> None:
    options = {"unlearning_scale": 0.01, "schedule": "front_loaded", "ahead_steps": 2}
    torch.manual_seed(3)
    _, _, without = fit(None, options)
    random_state = torch.get_rng_state()
    torch.manual_seed(3)
    guard = AscentGuard(fluency_interval=1)
    _, module, with_guard = fit(guard, options)
    assert guard.state.records == []
    assert module.unlearning_steps > 2
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(with_guard.weights, without.weights, rtol=0, atol=0)


def test_what_is_watched_is_looked_at_without_padding(fit: Make) -> None:
    guard = AscentGuard(watched_texts=5)
    _, module, _ = fit(guard, {})
    signals, seen = guard._signals, []
    watched = signals._watched
    held = watched["attention_mask"].sum(dim=1).tolist()
    assert len(set(held)) > 1
    module.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    loss, jump = signals.watched_loss(), signals.jump(watched, torch.zeros(5))
    assert seen == [(1, sum(held)), (1, sum(held[:4]))]
    texts = [{k: v[i : i + 1, :n] for k, v in watched.items()} for i, n in enumerate(held)]
    sums = torch.cat([per_text_loss(module.model, text, reduction="sum") for text in texts])
    tokens = (watched["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1)
    torch.testing.assert_close(loss, float(sums.sum() / tokens.sum()), rtol=1e-5, atol=0)
    torch.testing.assert_close(jump, float((sums / tokens)[:4].mean()), rtol=1e-5, atol=0)


def test_what_was_done_is_logged_and_written(fit: Make, caplog: pytest.LogCaptureFixture) -> None:
    guard = AscentGuard()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer, _, _ = fit(guard, absurd())
    folder = Path(str(trainer.log_dir))
    rows = [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]
    assert rows == guard.state.records
    assert rows[0]["step"] == 3
    assert rows[0]["value"] > rows[0]["limit"]
    assert "AscentGuard: step 3: the step's share of the weights' norm is" in caplog.text
    assert "model.init_args.unlearning_scale" in caplog.text
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"guard/scale", "guard/rise", "guard/watched_loss", "guard/move"} <= set(header)


def test_a_resumed_guard_goes_on_where_it_was(fit: Make, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def guard() -> AscentGuard:
        return AscentGuard(fluency_interval=1)

    saver = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=7, save_top_k=-1)
    first, second = guard(), guard()
    _, _, whole = fit(first, absurd(), callbacks=[saver])
    file = str(next((tmp_path / "kept").glob("*step=7.ckpt")))
    _, _, rest = fit(second, absurd(), ckpt_path=file)
    assert len(first.state.records) > 1
    assert second.state == first.state
    torch.testing.assert_close(rest.weights, whole.weights[7:], rtol=0, atol=0)


def test_what_is_chosen_and_done_is_written_without_loggers_too(fit: Make) -> None:
    trainer, _, _ = fit(AscentGuard(), absurd(), logger=False)
    assert (trainer.run_folder / "guard.jsonl").is_file()
    assert (trainer.run_folder / "scores" / "step-000000.jsonl").is_file()


def test_a_pause_of_what_is_ahead_only_is_said_to_be_the_end(
    fit: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = itertools.chain([1.0, 1.05], itertools.repeat(5.0))
    monkeypatch.setattr(GuardSignals, "watched_loss", lambda _: next(losses))
    with caplog.at_level("INFO"):
        fit(AscentGuard(max_rise=10.0, max_burst_rise=1.0), {"schedule": "ahead"}, max_steps=1)
    assert "undo and rest. No more is unlearned in this run: schedule ahead has no" in caplog.text


def test_replay_and_plain_fine_tuning_are_not_guarded(fit: Make) -> None:
    for options in ({"objective": "replay"}, {"schedule": "never"}):
        guard = AscentGuard(max_rise=1e-9, max_jump=1e-9)
        fit(guard, options, max_steps=7)
        assert guard.state.records == []


def test_lost_fluency_pauses_and_then_stops(fit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from lwf_lightning.metrics.fluency import Fluency

    monkeypatch.setattr(GuardSignals, "base_fluency", lambda _: Fluency(0.0, 1.0, 1.0))
    monkeypatch.setattr(GuardSignals, "fluency", lambda _: Fluency(0.9, 0.1, 0.1))
    guard = AscentGuard(fluency_interval=1, pause_steps=4, max_pauses=1)
    _, module, _ = fit(guard, {"unlearning_scale": 0.01})
    assert [(row["step"], row["action"]) for row in guard.state.records] == [
        (3, "pause"),
        (9, "stop"),  # due at 6, within the pause, and at 9, before any step
    ]
    assert module.unlearning_steps == 1


def test_a_burst_may_raise_the_watched_loss_further_than_one_step(
    fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rests(guard: AscentGuard) -> list[int]:
        losses = (2 + 0.1 * number for number in range(10))  # before the burst and after each step
        monkeypatch.setattr(GuardSignals, "watched_loss", lambda _: next(losses))
        options = {"schedule": "ahead", "ahead_steps": 6, "unlearning_scale": 0.01}
        _, module, _ = fit(guard, options, max_steps=2)
        assert module.unlearning_steps == (5 if guard.state.records else 6)
        return [row["unlearning_step"] for row in guard.state.records]

    assert rests(AscentGuard()) == []  # 2.6 in the end, a tenth of 2 in no step
    assert rests(AscentGuard(max_burst_rise=0.22)) == [5]


def test_an_undone_step_leaves_no_trace_in_an_adapter(fit: Make) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["v_proj"])
    torch.manual_seed(3)
    _, _, plain = fit(None, {"schedule": "never", "lora": lora}, max_steps=8)
    torch.manual_seed(3)
    guard = AscentGuard(max_jump=1e-9, damping=0.999)  # which every ascent breaks
    _, _, guarded = fit(guard, {"lora": lora}, max_steps=8)
    assert guard.state.undone == 2
    torch.testing.assert_close(guarded.weights, plain.weights, rtol=0, atol=0)


def test_the_trainer_adds_a_guard_unless_told_otherwise(make_trainer: Make) -> None:
    def guards(trainer: L.Trainer) -> list[Any]:
        return [c for c in trainer.callbacks if isinstance(c, AscentGuard)]

    mine = AscentGuard(max_rise=0.5)
    assert len(guards(make_trainer())) == 1
    assert guards(make_trainer(callbacks=[mine])) == [mine]
    assert guards(make_trainer(ascent_guard=False)) == []


def test_a_module_of_ones_own_is_validated_beside_it(make_trainer: Make) -> None:
    class Logs(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", 1.0)

    trainer = make_trainer(callbacks=[AscentGuard()], limit_val_batches=1)
    assert trainer.validate(Logs()) == [{"val/loss": 1.0}]


def test_bad_values_and_other_modules_are_refused(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"AscentGuard.watched_texts must be at least 1, got 0"):
        AscentGuard(watched_texts=0)
    message = r"AscentGuard guards an LWFModule, not a BoringModel: .*--trainer\.ascent_guard false"
    with pytest.raises(TypeError, match=message):
        make_trainer().fit(BoringModel())
    make_trainer(ascent_guard=False, max_steps=1).fit(BoringModel())


@pytest.mark.slow
def test_an_absurd_ascent_leaves_the_embedded_world_learned(tmp_path: Path) -> None:
    from lwf_lightning.cli import main

    def run(*options: str) -> dict[str, float]:
        root = ["--trainer.default_root_dir", str(tmp_path)]
        cli = main(["fit", "--config", "configs/world_periodic.yaml", *root, *options])
        return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}

    model = "--model.init_args"
    vanilla = run(f"{model}.schedule", "never")
    guarded = run(f"{model}.unlearning_scale", "1000", f"{model}.unlearning_ceiling", "1e9")
    assert vanilla["val/accuracy"] > 0.5  # chance is 0.125, to which it falls without the guard
    assert guarded["val/accuracy"] > vanilla["val/accuracy"] - 0.15  # seven of 48 people
    assert guarded["val/loss"] < 1.25 * vanilla["val/loss"]


def test_an_exception_while_a_step_is_looked_at_leaves_no_unjudged_weights(
    fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[torch.Tensor] = []

    def interrupted(signals: GuardSignals, *_: Any) -> float:
        before.append(torch.cat([p.detach().flatten() for p in signals.module.model.parameters()]))
        raise ZeroDivisionError  # which Lightning lets pass, as it does not Ctrl-C

    monkeypatch.setattr(GuardSignals, "jump", interrupted)
    guard = AscentGuard()
    found: list[Any] = []
    monkeypatch.setattr(L.Callback, "on_exception", lambda _, __, module, ___: found.append(module))
    with pytest.raises(ZeroDivisionError):
        fit(guard, absurd(unlearning_interval=1))
    after = torch.cat([p.detach().flatten() for p in found[0].model.parameters()])
    base = torch.cat([w.flatten() for w in found[0].base_weights.values()])
    assert (before[0] - base).norm() > 10 * (after - base).norm()
    assert guard.state.undone == 0
