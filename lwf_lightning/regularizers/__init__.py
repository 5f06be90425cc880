"""Structural baselines of learning steps, and the names under which configurations ask for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from lwf_lightning.named import build_by_name
from lwf_lightning.regularizers.base import FeaturePenalty, WeightPull
from lwf_lightning.regularizers.bss import BatchSpectralShrinkage
from lwf_lightning.regularizers.ewc import EWC
from lwf_lightning.regularizers.features import head_inputs, prompt_features
from lwf_lightning.regularizers.l2sp import L2SP

Regularizer: TypeAlias = FeaturePenalty | WeightPull

RegularizerName: TypeAlias = Literal["bss", "l2sp", "ewc", "srs"]
"""``srs`` is an empty slot; see :func:`build_regularizer`."""

REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    "bss": BatchSpectralShrinkage,
    "l2sp": L2SP,
    "ewc": EWC,
}


def build_regularizer(name: str, options: Mapping[str, float] | None = None) -> Regularizer:
    """Builds a regularizer by its name.

    Args:
        name: A key of ``REGULARIZERS``. ``srs`` is named by arXiv 2505.19715 as a baseline; its
            definition could not be found, so it is refused rather than invented.
        options: Its keyword arguments, such as ``{"strength": 0.01}``.

    Raises:
        ValueError: If the name or an option is unknown, or a value is out of range.

    Example:
        >>> build_regularizer("bss", {"count": 2}).count
        2
    """
    if name == "srs":
        raise ValueError(
            "regularizer 'srs' is an empty slot: arXiv 2505.19715 names it as a baseline, but its "
            f"definition could not be found. Choose one of {', '.join(REGULARIZERS)}"
        )
    return build_by_name("regularizer", REGULARIZERS, name, options)


__all__ = [
    "EWC",
    "L2SP",
    "REGULARIZERS",
    "BatchSpectralShrinkage",
    "FeaturePenalty",
    "Regularizer",
    "RegularizerName",
    "WeightPull",
    "build_regularizer",
    "head_inputs",
    "prompt_features",
]
