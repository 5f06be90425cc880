"""Whose a run folder is: one trainer's, and found again by what makes its run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed

from lwf_lightning import LWFDataModule, LWFModule, LWFTrainer
from lwf_lightning.callbacks import StepCheckpoint, ValidateFirst
from lwf_lightning.resumption import CheckpointConnector, step_checkpoint
from lwf_lightning.runs import begin_run, claim, configuration, runs_of

Make = Callable[..., Any]


def folder(trainer: L.Trainer) -> Path:
    return Path(str(trainer.log_dir))


def saved(trainer: L.Trainer) -> list[str]:
    return sorted(path.name for path in (folder(trainer) / "checkpoints").iterdir())


def test_trainers_made_before_the_first_fit_have_a_folder_each(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    trainers = [make_trainer(max_steps=steps) for steps in (2, 3)]
    for trainer in trainers:
        trainer.fit(make_module(schedule="never"), make_data())
    for number, (trainer, rows) in enumerate(zip(trainers, (2, 3), strict=True)):
        assert folder(trainer).name == f"version_{number}"
        assert saved(trainer) == [f"step-{rows:06d}.ckpt"]
        assert (folder(trainer) / "metrics.csv").read_text().count("\n") == 1 + rows
        assert list(folder(trainer).glob("events*"))
    third, fourth = make_trainer(max_steps=4), make_trainer(max_steps=1)
    third.fit(make_module(schedule="never"), make_data(), ckpt_path="last")  # which is the second
    fourth.fit(make_module(schedule="never"), make_data())
    assert [folder(trainer).name for trainer in (third, fourth)] == ["version_1", "version_2"]


def test_of_runs_that_begin_at_the_same_moment_one_has_the_folder(tmp_path: Path) -> None:
    ready, folders = (
        Barrier(4, timeout=60),
        [tmp_path / f"version_{number}" for number in range(40)],
    )
    for one in folders[::2]:  # there already, without a run in it
        one.mkdir()

    def begin(name: int) -> list[Path]:
        own = []
        for one in folders:
            ready.wait()
            if begin_run(one, {"name": name}):
                own.append(one)
        return own

    with ThreadPoolExecutor(4) as runs:
        found = list(runs.map(begin, range(4)))
    assert sorted(one for own in found for one in own) == sorted(folders)
    for name, own in enumerate(found):
        assert all(json.loads((one / "run.json").read_text()) == {"name": name} for one in own)


def test_a_run_leaves_a_folder_that_another_takes_while_it_looks(
    make_module: Make, make_data: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=2)
    first = trainer.run_folder
    own = CheckpointConnector._configuration

    def slow(self: CheckpointConnector) -> dict[str, Any]:  # asked for between looking and marking
        if not first.exists():
            begin_run(first, {"theirs": 1})
        return own(self)

    monkeypatch.setattr(CheckpointConnector, "_configuration", slow)
    trainer.fit(make_module(schedule="never"), make_data())
    assert json.loads((first / "run.json").read_text()) == {"theirs": 1}
    assert sorted(path.name for path in first.iterdir()) == ["run.json"]
    assert folder(trainer).name == "version_1"
    assert saved(trainer) == ["step-000002.ckpt"]


class Passing(LWFDataModule):
    def __init__(self, extra: int, **others: Any) -> None:
        super().__init__(**others)
        self.extra = extra


class Reckoning(LWFDataModule):
    def __init__(self, texts: int, **others: Any) -> None:
        super().__init__("world_learning", batch_size=2 * texts)


class Foreign(L.LightningDataModule):
    def __init__(self, rows: int, source: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Derived(Foreign):
    pass


@pytest.mark.parametrize(
    ("data", "same", "other", "differs"),
    [
        (Passing, {"extra": 1, "learning_task": "world_learning"}, {"extra": 2}, "extra"),
        (Passing, {"extra": 1, "learning_task": "world_learning"}, {"seed": 3}, "seed"),
        (Reckoning, {"texts": 4}, {"texts": 5}, "batch_size"),
        (Foreign, {"rows": 4, "source": object()}, {"rows": 5}, "rows"),
    ],
)
def test_every_argument_of_a_datamodule_of_ones_own_tells_runs_apart(
    data: type[L.LightningDataModule],
    same: dict[str, Any],
    other: dict[str, Any],
    differs: str,
    make_module: Make,
    make_trainer: Make,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def values(**arguments: Any) -> dict[str, Any]:
        return configuration(make_trainer(), make_module(), data(**arguments))

    run = tmp_path / "version_0"
    begin_run(run, values(**same))
    again = same | {name: object() for name in same if name == "source"}
    assert runs_of(tmp_path, values(**again)) == [run]
    assert runs_of(tmp_path, values(**(same | other))) == []
    assert f"version_0 (another data.init_args.{differs})" in str(recwarn.pop().message)


def test_another_class_is_another_run_but_to_runs_that_noted_none(
    make_module: Make, make_trainer: Make, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run, trainer, module = tmp_path / "version_0", make_trainer(), make_module()
    noted = configuration(trainer, module, Foreign(4))
    begin_run(run, noted)
    assert runs_of(tmp_path, configuration(trainer, module, Derived(4))) == []
    assert "version_0 (another data.class_path)" in str(recwarn.pop().message)
    before = {key: value for key, value in noted.items() if not key.endswith("class_path")}
    (run / "run.json").write_text(json.dumps(before), encoding="utf-8")
    assert runs_of(tmp_path, configuration(trainer, module, Derived(4))) == [run]


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"fast_dev_run": True}])
def test_a_run_that_saves_nothing_begins_too(
    options: dict[str, Any], make_module: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    def go_on() -> Any:
        trainer = make_trainer(**options)
        trainer.fit(make_module(schedule="never"), make_data(), ckpt_path="last")
        assert trainer.global_step == (1 if trainer.fast_dev_run else 8)
        return trainer

    with pytest.warns(UserWarning, match="no run of this configuration in .*: one begins"):
        trainer = go_on()
    values = configuration(trainer, trainer.lightning_module, trainer.datamodule)
    begin_run(tmp_path / "runs" / "version_7", values)
    with pytest.warns(UserWarning, match="no checkpoint of a run of this configuration in .*: one"):
        go_on()


class WithFolder(LWFModule):
    def __init__(self, folder: Path, **others: Any) -> None:
        super().__init__(**others)


class Remembering(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"place": Path("x")}


def test_a_run_that_could_not_go_on_is_refused(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    module, trainer = WithFolder(Path("x"), **make_module(schedule="never").hparams), make_trainer()
    with pytest.raises(TypeError, match=r"hyper_parameters\.folder is a PosixPath"):
        trainer.fit(module, make_data())
    assert not folder(trainer).exists()
    module.hparams["folder"] = "x"
    trainer = make_trainer(callbacks=[Remembering(), StepCheckpoint(every_n_steps=2)])
    with pytest.raises(TypeError, match=r"callbacks\.Remembering\.place is a PosixPath"):
        trainer.fit(module, make_data())
    assert trainer.global_step == 2


class EnoughAfterOne(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = True


def test_a_run_that_has_ended_under_fsdp2_has_finished_too(
    make_module: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(ckpt_path: str | None) -> list[str]:
        trainer = make_trainer(
            callbacks=[EnoughAfterOne()], strategy=ModelParallelStrategy(1, 1), devices=1
        )
        trainer.fit(make_module(schedule="never"), make_data(), ckpt_path=ckpt_path)
        return saved(trainer)

    with patch.dict(os.environ):  # into which the strategy writes where the processes meet
        try:
            assert fit(None) == ["step-000001.ckpt"]
            with caplog.at_level("INFO"):
                assert fit("last") == ["step-000001.ckpt"]
        finally:
            distributed.destroy_process_group()
    assert "version_0 has finished: nothing is left to do" in caplog.text


def test_a_file_in_the_place_of_a_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "version_0").touch()
    with pytest.raises(ValueError, match="version_0 is in the way of a run's folder: remove it"):
        begin_run(tmp_path / "version_0", {})


HOLDS = """
import sys
from pathlib import Path
from lwf_lightning.runs import claim
held = claim(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_trains_is_left_alone(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    first = make_trainer(max_steps=2)
    first.fit(make_module(schedule="never"), make_data())
    run = str(folder(first))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    before = {path: path.read_bytes() for path in folder(first).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"another process is training the run in {run}"):
        make_trainer(max_steps=3).fit(make_module(schedule="never"), make_data(), ckpt_path="last")
    assert before == {path: path.read_bytes() for path in before}
    other.kill()  # however it ends
    other.wait()
    again = make_trainer(max_steps=3)
    again.fit(make_module(schedule="never"), make_data(), ckpt_path="last")
    assert (folder(again), again.global_step) == (folder(first), 3)
    assert again._checkpoint_connector._claim is None  # the next process may go on


def test_a_fit_that_fails_lets_its_run_go(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    class Fails(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            raise RuntimeError("by a callback")

    trainer = make_trainer(max_steps=2, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="by a callback"):
        trainer.fit(make_module(schedule="never"), make_data())
    assert trainer._checkpoint_connector._claim is None


def test_evaluations_of_two_trainers_have_a_folder_each(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    for options, name in (({"logger": False}, "predictions.jsonl"), ({"logger": True}, None)):
        trainers = [make_trainer(**options) for _ in range(2)]
        for trainer, examples in zip(trainers, (2, 5), strict=True):
            data = make_data(eval_examples=examples)
            if name:
                trainer.predict(make_module(schedule="never"), data)
            else:
                trainer.validate(make_module(schedule="never"), data, verbose=False)
        one, two = (trainer.run_folder for trainer in trainers)
        assert one != two
        if name:
            counts = [len((run / name).read_text().splitlines()) for run in (one, two)]
            assert counts == [2, 5]
        trainers[0].validate(make_module(schedule="never"), make_data(), verbose=False)
        assert trainers[0].run_folder == one  # it stays in its own


def test_a_fresh_job_takes_nothing_that_others_left(
    make_module: Make, make_data: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning takes the newest file of SLURM's signal in the root, whoever wrote it."""
    first = make_trainer(max_steps=2)
    first.fit(make_module(schedule="never"), make_data())
    first.save_checkpoint(first._checkpoint_connector.hpc_save_path(str(first.default_root_dir)))
    for name in ("JOB_ID", "NTASKS"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for rate in (1e-3, 2e-3):  # as the first one's, and another
        fresh = make_trainer(max_steps=1)
        fresh.fit(make_module(schedule="never", learning_rate=rate), make_data())
        assert (fresh.global_step, fresh.ckpt_path) == (1, None)
        assert folder(fresh) != folder(first)
    fresh.validate(make_module(schedule="never"), make_data(), verbose=False)
    assert fresh.ckpt_path is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = make_trainer(max_steps=3)
    again.fit(make_module(schedule="never"), make_data())
    assert (folder(again), again.global_step) == (folder(first), 3)


def test_steps_of_another_number_of_texts_are_warned_of(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(max_steps=2)
    trainer.fit(make_module(schedule="never"), make_data(batch_size=4))
    file = str(folder(trainer) / "checkpoints" / "step-000002.ckpt")
    with pytest.warns(UserWarning, match=r"steps have 4 texts .*data\.init_args\.batch_size .* 2:"):
        make_trainer(max_steps=3).fit(
            make_module(schedule="never"), make_data(batch_size=2), ckpt_path=file
        )


def test_a_folder_that_is_not_local_is_refused() -> None:
    with pytest.raises(ValueError, match=r"default_root_dir: s3://bucket/runs is no local folder"):
        LWFTrainer(default_root_dir="s3://bucket/runs")


def test_a_first_validation_is_not_done_again(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    """By a run that was interrupted between it and its first step."""

    class Leaves(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            raise SystemExit(step_checkpoint(trainer).save(trainer))

    def options() -> dict[str, Any]:
        return {"max_steps": 2, "limit_val_batches": 1, "logger": True}

    def table(trainer: Any) -> str:
        trainer.fit(make_module(schedule="never"), make_data(), ckpt_path="last")
        return (folder(trainer) / "metrics.csv").read_text()

    with pytest.raises(SystemExit):
        table(make_trainer(callbacks=[ValidateFirst(), Leaves()], **options()))
    resumed = make_trainer(callbacks=[ValidateFirst()], **options())
    found = table(resumed)
    assert folder(resumed).name == "version_0"
    other = make_trainer(callbacks=[ValidateFirst()], **options())
    other.fit(make_module(schedule="never"), make_data())
    assert (folder(other) / "metrics.csv").read_text() == found


@pytest.mark.parametrize("kind", ["a file", "a link that leads nowhere"])
def test_what_is_in_the_way_of_a_folder_is_named(
    kind: str, make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(logger=True)
    trainer.run_folder.parent.mkdir(exist_ok=True)
    if kind == "a file":
        trainer.run_folder.write_text("")
    else:
        trainer.run_folder.symlink_to("gone")
    with pytest.raises(ValueError, match=r"version_0 is no folder, where a run would be"):
        trainer.validate(make_module(schedule="never"), make_data(), verbose=False)


def test_what_a_user_has_logged_and_what_follows_lie_in_one_folder(
    make_module: Make, make_data: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(logger=True, max_steps=1)
    trainer.logger.log_hyperparams({"mine": 1})
    trainer.validate(make_module(schedule="never"), make_data(), verbose=False)
    trainer.fit(make_module(schedule="never"), make_data())
    assert [path.name for path in trainer.run_folder.parent.iterdir()] == ["version_0"]


def test_a_second_trainer_of_a_process_leaves_the_first_its_claim(tmp_path: Path) -> None:
    first = claim(tmp_path)
    assert first is not None
    assert claim(tmp_path) is None
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert "another process is training the run" in other.communicate()[1]
    first.close()
    again = claim(tmp_path)
    assert again is not None
    again.close()
