"""Checks the arguments of FisherCallback: a wrong name or range is said before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from lwf_lightning.forgetting.confidence import TextStep, check_alpha
from lwf_lightning.forgetting.fisher import FisherEstimator
from lwf_lightning.forgetting.select import check_selection
from lwf_lightning.losses import Reduction
from lwf_lightning.named import check_name

Anchor: TypeAlias = Literal["probe", "online"]

_NAMES = {
    "anchor": Anchor,
    "estimator": FisherEstimator,
    "reduction": Reduction,
    "text_step": TextStep,
}
_AT_LEAST_ONE = (
    "refresh_interval",
    "fisher_texts",
    "probe_steps",
    "probe_batch_size",
    "batch_size",
)


def check_arguments(values: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if an argument of :class:`FisherCallback` is out of range.

    Args:
        values: The arguments by name; others are ignored.
    """
    for name, known in _NAMES.items():
        check_name(name, values[name], get_args(known))
    if values["anchor"] == "online" and values["refresh_interval"] is None:
        raise ValueError("anchor 'online' needs a refresh_interval, in learning steps")
    if values["anchor"] == "probe" and values["refresh_interval"] is not None:
        raise ValueError(
            "anchor 'probe' is found once, before the first learning step: leave out "
            "refresh_interval, or set anchor to 'online'"
        )
    for name in _AT_LEAST_ONE:
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}")
    if values["alpha"] is not None:
        check_alpha(values["alpha"])
    rate = values["probe_learning_rate"]
    if rate is not None and not rate > 0:
        raise ValueError(f"probe_learning_rate must be above 0, got {rate}")
    if values["probe_folder"] is not None and values["anchor"] != "probe":
        raise ValueError(f"probe_folder keeps probes, and anchor {values['anchor']!r} needs none")
    for name in ("learning_batches", "forget_batches"):
        if values[name] is not None and len(values[name]) == 0:
            raise ValueError(f"{name} holds no batch")
    check_selection(values["strategy"], values["forgetting_rate"], values["threshold"])
