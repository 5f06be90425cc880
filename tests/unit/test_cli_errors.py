"""Which errors are one line, and which keep their traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel

from lwf_lightning import cli_errors
from lwf_lightning.cli_errors import clear_errors
from lwf_lightning.errors import NonFiniteLossError


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the functions of this file count as the package's."""
    monkeypatch.setattr(cli_errors, "_PACKAGE", Path(__file__).parent)


def in_a_line() -> None:
    raise ValueError("raised on purpose")


def over_lines() -> None:
    raise TypeError(
        "raised "
        + str.lower(
            "ON",
        )
        + " purpose"
    )


def by_a_helper() -> None:
    list(map(_refuse, [1]))


def _refuse(value: int) -> None:
    if value:
        raise NonFiniteLossError(f"raised {'on'} purpose")


def from_another() -> None:
    try:
        int("one")
    except ValueError as error:
        message = "raised on purpose"
        raise ValueError(message) from error


def again() -> None:
    try:
        in_a_line()
    except ValueError:
        torch.zeros(1)
        raise


@pytest.mark.parametrize("deliberate", [in_a_line, over_lines, by_a_helper, from_another, again])
def test_what_our_code_raises_is_one_line(
    deliberate: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, clear_errors():
        deliberate()
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: raised on purpose\n"


nothing: Any = None


def of_a_builtin() -> None:
    len(nothing)


def of_an_operator() -> None:
    nothing + 1


def of_an_iteration() -> None:
    list(zip([1], [], strict=True))


def of_torch() -> None:
    torch.zeros(2, dtype="float")  # type: ignore[call-overload]


def within_a_raise() -> None:
    raise ValueError("of " + nothing)


@pytest.mark.parametrize(
    "defect", [of_a_builtin, of_an_operator, of_an_iteration, of_torch, within_a_raise]
)
def test_a_defect_of_our_code_keeps_its_traceback(defect: Callable[[], None]) -> None:
    with pytest.raises((ValueError, TypeError)), clear_errors():
        defect()


def test_what_lightning_raises_is_one_line_of_whatever_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        limit_train_batches=2,
        limit_val_batches=1,
        max_epochs=1,
        callbacks=[EarlyStopping("val/los")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    with pytest.raises(SystemExit), clear_errors():
        trainer.fit(BoringModel())
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: Early stopping conditioned on metric `val/los` which is not")


def test_a_runtime_error_of_ours_is_a_defect() -> None:
    def broken() -> None:
        raise RuntimeError("cannot be")

    with pytest.raises(RuntimeError, match="cannot be"), clear_errors():
        broken()


OF_ONES_OWN = """
def of_ones_own(module):
    module.trainer
"""


def test_what_lightning_says_about_code_of_ones_own_keeps_its_place() -> None:
    found: dict[str, Any] = {}
    exec(compile(OF_ONES_OWN, "/my/project/module.py", "exec"), found)
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"), clear_errors():
        found["of_ones_own"](BoringModel())


def test_an_error_without_words_is_a_defect() -> None:
    with pytest.raises(NotImplementedError), clear_errors():
        BasePredictionWriter().write_on_epoch_end(*[nothing] * 4)
