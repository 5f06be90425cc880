"""Arguments of a module that derives from LWFModule."""

from __future__ import annotations

from typing import Any

import pytest

from lwf_lightning import LWFModule


class Converts(LWFModule):
    def __init__(self, learning_rate: float = 1.0, **options: Any) -> None:
        super().__init__("world-base", learning_rate=learning_rate * 1e-4, **options)


class PassesOn(LWFModule):
    def __init__(self, learning_rate: float = 1e-4, extra: int = 3, **options: Any) -> None:
        super().__init__("world-base", learning_rate=learning_rate, **options)


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"Converts takes learning_rate=3.0 and passes learning_rate=0.000\d+ on to "
        "LWFModule: give its own argument another name",
    ):
        Converts(3.0)


def test_arguments_of_ones_own_are_kept_beside() -> None:
    module = PassesOn(extra=4, schedule="never")
    assert (module.hparams["learning_rate"], module.hparams["extra"]) == (1e-4, 4)
    assert module.hparams["schedule"] == "never"
