"""Which run and which checkpoint ``ckpt_path="last"`` goes on with."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers.logger import DummyLogger

from lwf_lightning.callbacks import AscentGuard, ExportCallback, StepCheckpoint
from lwf_lightning.checkpoint_io import _SummedFile
from lwf_lightning.errors import DamagedFileError, DiskFullError
from lwf_lightning.forgetting.weights import copy_weights
from lwf_lightning.runs import last_whole_checkpoint, run_state

Make = Callable[..., Any]


class Counter(L.Callback):
    """Counts the learning steps of one process."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


@pytest.fixture
def fit(make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path) -> Make:
    """Runs a fit of plain fine-tuning; gives its trainer, module and number of steps."""

    def run(
        ckpt_path: str | None = None,
        *more: L.Callback,
        steps: int = 6,
        root: Path = tmp_path,
        logger: Any = True,
        **model: Any,
    ) -> Any:
        module, counter = make_module(schedule="never", **model), Counter()
        callbacks = [StepCheckpoint(every_n_steps=2), counter, *more]
        trainer = make_trainer(
            max_steps=steps, callbacks=callbacks, default_root_dir=root, logger=logger
        )
        trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        return trainer, module, counter.steps

    return run


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def saved(trainer: L.Trainer) -> list[Path]:
    return sorted((Path(str(trainer.log_dir)) / "checkpoints").iterdir())


def test_the_last_two_checkpoints_are_kept(fit: Make) -> None:
    trainer, _, _ = fit(steps=5)
    assert [path.name for path in saved(trainer)] == ["step-000004.ckpt", "step-000005.ckpt"]
    assert trainer.checkpoint_callback.best_model_path == str(saved(trainer)[-1])


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(cut: bool, fit: Make) -> None:
    trainer, whole, _ = fit()
    before, last = saved(trainer)
    content = last.read_bytes()
    if cut:
        last.write_bytes(content[: len(content) // 2])
    else:
        flip(last)
    with pytest.warns(UserWarning, match=rf"{last.name} is (cut short|damaged).*an earlier one"):
        trainer, module, steps = fit("last")
    assert steps == 2
    assert saved(trainer) == [before, last]
    torch.testing.assert_close(
        copy_weights(module.model), copy_weights(whole.model), rtol=0, atol=0
    )
    flip(before)
    flip(last)
    with pytest.raises(DamagedFileError, match=r"all checkpoints in .* are damaged: remove"):
        fit("last")
    with pytest.raises(DamagedFileError, match=rf"{last.name} is damaged"):
        fit(str(last))


def test_a_sharded_checkpoint_is_whole_once_its_last_file_is(fit: Make, tmp_path: Path) -> None:
    trainer, _, _ = fit()
    before, last = saved(trainer)
    content = last.read_bytes()
    last.unlink()
    last.mkdir()
    dcp.save({"state_dict": {"a": torch.ones(3)}}, checkpoint_id=last)
    run = Path(str(trainer.log_dir))
    with pytest.warns(UserWarning, match=rf"{last.name} is not whole: meta.pt is missing"):
        assert last_whole_checkpoint(run) == before
    (last / "meta.pt").write_bytes(content)
    assert last_whole_checkpoint(run) == last
    assert run_state(last)["step"] == 6


def test_a_run_that_has_finished_has_nothing_left_to_do(
    fit: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, whole, _ = fit()
    before = {path: path.read_bytes() for path in Path(str(trainer.log_dir)).rglob("*.csv")}
    with caplog.at_level("INFO"):
        trainer, module, steps = fit("last")
    assert steps == 0
    assert "version_0 has finished: nothing is left to do" in caplog.text
    torch.testing.assert_close(
        copy_weights(module.model), copy_weights(whole.model), rtol=0, atol=0
    )
    assert {p: p.read_bytes() for p in Path(str(trainer.log_dir)).rglob("*.csv")} == before
    trainer, _, steps = fit("last", steps=9)  # a later end gives it something to do
    assert steps == 3
    assert trainer.global_step == 9
    assert Path(str(trainer.log_dir)).name == "version_0"


class TimeIsUp(Timer):
    """``trainer.max_time``, counted in steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(timedelta(seconds=steps))
        self.step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.step = trainer.global_step
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, stage: str = "train") -> float:
        return self.step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["time_elapsed"]["train"]


@pytest.mark.parametrize("limits", [{"max_steps": 8}, {"max_steps": -1, "max_epochs": 1}])
def test_a_run_whose_time_is_up_goes_on_with_more_time(
    limits: dict[str, int],
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fit(name: str, *more: L.Callback) -> tuple[int, dict[str, torch.Tensor]]:
        module, counter = make_module(schedule="never"), Counter()
        root, callbacks = tmp_path / name, [counter, *more]
        trainer = make_trainer(default_root_dir=root, callbacks=callbacks, **limits)
        trainer.fit(module, make_data(), ckpt_path="last")
        return counter.steps, copy_weights(module.model)

    steps, whole = fit("whole")
    assert [fit("cut", TimeIsUp(time))[0] for time in (3, 3, 5)] == [3, 0, 2]
    assert "has finished" not in caplog.text
    rest, weights = fit("cut")  # with no end of time
    assert rest == steps - 5
    torch.testing.assert_close(weights, whole, rtol=0, atol=0)
    assert fit("cut", TimeIsUp(5))[0] == 0
    assert "version_0 has finished: nothing is left to do" in caplog.text


def test_a_run_that_stopped_by_itself_has_finished(fit: Make) -> None:
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    trainer, _, steps = fit(None, Enough())
    assert steps == 3
    assert fit("last", Enough())[2] == 0
    # By its file it is the beginning of another run, with limits of its own, be they the same.
    another, _, steps = fit(str(saved(trainer)[-1]), learning_rate=3e-3)
    assert (steps, Path(str(another.log_dir)).name) == (3, "version_1")
    assert fit("last", steps=7)[2] == 4
    assert fit("last", learning_rate=3e-3)[2] == 0


class Stop(L.Callback):
    """Makes the gradient of a step NaN, and ends the process, as it were, at a later one."""

    def __init__(self, poisoned: int, last: int | None) -> None:
        self.poisoned, self.last = poisoned, last

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.last:
            raise KeyboardInterrupt
        self.hook = None
        if trainer.global_step == self.poisoned and pl_module.skipped_steps == 0:
            parameter = next(pl_module.model.parameters())
            self.hook = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


@pytest.mark.parametrize("poisoned", [1, 3, 4])
def test_a_skipped_step_leaves_the_rows_of_the_others_alone(
    poisoned: int, make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    def table(name: str, last: int | None, ckpt_path: str | None = None) -> str:
        trainer = make_trainer(
            default_root_dir=tmp_path / name,
            callbacks=[StepCheckpoint(every_n_steps=3), Stop(poisoned, last)],
        )
        with suppress(SystemExit):  # of an interrupted run
            trainer.fit(make_module(schedule="never"), make_data(), ckpt_path=ckpt_path)
        return (tmp_path / name / "version_0" / "metrics.csv").read_text()

    whole = table("whole", None)
    assert whole.count("\n") == 1 + 8 + 1
    table("cut", 5)
    assert table("cut", None, "last") == whole


def test_another_configuration_is_another_run(fit: Make, recwarn: pytest.WarningsRecorder) -> None:
    fit()
    trainer, _, steps = fit("last", learning_rate=3e-3)
    assert steps == 6
    assert Path(str(trainer.log_dir)).name == "version_1"
    assert any("version_0 (another model.init_args.learning_rate)" in str(w.message)
               for w in recwarn)  # fmt: skip
    trainer, _, steps = fit("last", max_skipped_steps=3)  # nothing that makes it another
    assert steps == 0
    assert Path(str(trainer.log_dir)).name == "version_0"


@pytest.mark.parametrize(
    ("callbacks", "seed", "precision", "differs"),
    [
        ({}, 2, "32-true", "seed_everything"),
        ({}, 1, "bf16-mixed", "trainer.precision"),
        ({"strategy": "lowest"}, 1, "32-true", "trainer.callbacks.FisherCallback.strategy"),
        ({"guard": 0.5}, 1, "32-true", "trainer.callbacks.AscentGuard.max_rise"),
    ],
)
def test_what_shapes_the_result_outside_module_and_data_makes_another_run(
    callbacks: dict[str, Any],
    seed: int,
    precision: Any,
    differs: str,
    make_module: Make,
    make_data: Make,
    make_trainer: Make,
    make_callback: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # put back afterwards

    def fit(seed: int, precision: Any, *more: L.Callback, guard: float = 0.1, **fisher: Any) -> int:
        L.seed_everything(seed)
        counter = Counter()
        trainer = make_trainer(
            default_root_dir=tmp_path,
            max_steps=2,
            precision=precision,
            callbacks=[make_callback(**fisher), AscentGuard(max_rise=guard), counter, *more],
        )
        trainer.fit(make_module(schedule="never"), make_data(), ckpt_path="last")
        return counter.steps

    assert fit(1, "32-true") == 2
    assert fit(seed, precision, **callbacks) == 2
    assert any(f"version_0 (another {differs})" in str(w.message) for w in recwarn)
    # Nothing that changes no result, nor another callback, makes it another run.
    more = {"batch_size": 3, "save_tensors": False}
    assert fit(seed, precision, ExportCallback(), **callbacks, **more) == 0


class OwnLogger(DummyLogger):
    """A logger of one's own: as many are, with one ``save_dir`` for all runs, or none."""

    def __init__(self, save_dir: str | None) -> None:
        super().__init__()
        self.folder = save_dir

    @property
    def save_dir(self) -> str | None:
        return self.folder


@pytest.mark.parametrize("logger", [False, OwnLogger(None), OwnLogger("own")])
def test_whatever_the_loggers_a_run_is_found_again_and_no_other_for_it(
    logger: Any, fit: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, _, _ = fit(logger=logger, steps=3)
    with suppress(SystemExit):  # of a run of another configuration, before its first checkpoint
        fit(None, Stop(-1, 1), logger=logger, steps=3, learning_rate=3e-3)
    second, _, steps = fit("last", logger=logger, steps=3, learning_rate=3e-3)
    assert steps == 3
    again, _, steps = fit("last", logger=logger, steps=4)
    assert steps == 1
    runs = [Path(str(trainer.log_dir)) for trainer in (first, second, again)]
    assert runs == [tmp_path / f"version_{number}" for number in (0, 1, 0)]
    assert {path.name for path in tmp_path.iterdir()} <= {"version_0", "version_1", "cache"}


def test_another_reading_of_the_tasks_is_another_run(
    fit: Make, make_data: Make, make_module: Make, make_trainer: Make, tmp_path: Path
) -> None:
    fit()
    trainer = make_trainer(default_root_dir=tmp_path, max_steps=6)
    with pytest.warns(UserWarning, match=r"another data\.init_args\.choice_style\)"):
        trainer.fit(
            make_module(schedule="never"), make_data(choice_style="letters"), ckpt_path="last"
        )


def test_without_a_run_one_begins_and_nothing_is_evaluated(
    fit: Make, make_trainer: Make, make_module: Make, make_data: Make, tmp_path: Path
) -> None:
    def test(ckpt_path: str) -> Any:
        module, trainer = make_module(schedule="never"), make_trainer(default_root_dir=tmp_path)
        return trainer.test(module, datamodule=make_data(), ckpt_path=ckpt_path)

    with pytest.raises(ValueError, match=r"--ckpt_path last: .* has no run of this configuration"):
        test("last")
    with pytest.warns(UserWarning, match="no run of this configuration in .*: one begins"):
        trainer, _, steps = fit("last")
    assert steps == 6
    first = test("last")
    assert first == test(str(saved(trainer)[-1]))
    # One that was interrupted before its first checkpoint hides none that has one.
    newer = tmp_path / "version_99"
    newer.mkdir()
    marker = (tmp_path / "version_0" / "run.json").read_text()
    (newer / "run.json").write_text(marker)
    with pytest.warns(UserWarning, match="version_99 was interrupted before its first checkpoint"):
        assert test("last") == first
    shutil.rmtree(tmp_path / "version_0" / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint of a run of this configuration"):
        test("last")
    with pytest.raises(ValueError, match="--ckpt_path best: no ModelCheckpoint"):
        test("best")


def test_a_full_disk_stops_the_run_and_it_goes_on_later(
    fit: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, _ = fit()
    root = tmp_path / "full"
    with monkeypatch.context() as patch:
        write = _SummedFile.write

        def full(self: Any, data: Any) -> int:
            if "step-000004" in self.file.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, data)

        patch.setattr(_SummedFile, "write", full)
        with pytest.raises(DiskFullError, match=r"step-000004\.ckpt could not be written"):
            fit("last", root=root)
    assert [path.name for path in root.glob("*/checkpoints/*")] == ["step-000002.ckpt"]
    _, module, steps = fit("last", root=root)
    assert steps == 4
    torch.testing.assert_close(
        copy_weights(module.model), copy_weights(whole.model), rtol=0, atol=0
    )


def test_a_file_that_would_be_taken_for_a_step_checkpoint_is_refused(
    make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    named = {"filename": "step-{step:06d}", "auto_insert_metric_name": False, "save_top_k": -1}
    elsewhere = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=1, **named)
    for saver, refusal in (
        (ModelCheckpoint(**named), pytest.raises(ValueError, match=r"such as step-000001.ckpt")),
        (elsewhere, nullcontext()),
    ):
        trainer = make_trainer(callbacks=[StepCheckpoint(keep=1), saver], max_steps=2)
        with refusal:
            trainer.fit(make_module(schedule="never"), make_data())
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_no_checkpoints_are_saved_where_none_are_wanted(make_trainer: Make) -> None:
    for options in ({"enable_checkpointing": False}, {"fast_dev_run": True}):
        trainer = make_trainer(**options)
        assert not any(isinstance(callback, StepCheckpoint) for callback in trainer.callbacks)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        StepCheckpoint(every_n_steps=0)


WRITERS = """
import sys, warnings
from pathlib import Path
from lwf_lightning.forgetting.elicit import SelfKnowledge, SelfText, _read_cache, _write_cache
warnings.simplefilter("error")  # a damaged file would be warned of
path = Path(sys.argv[1])
text = SelfText("p" * 2000, "a", (1, 2), (3,), "task", 0)
knowledge = SelfKnowledge([text] * 50, dropped=2)
for _ in range(150):
    _write_cache(path, "print", knowledge)
    assert _read_cache(path, "print") == knowledge
"""


def test_two_processes_that_want_the_same_cache_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "print.jsonl"
    command = [sys.executable, "-c", WRITERS, str(path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [file.name for file in tmp_path.iterdir()] == ["print.jsonl"]
