"""Unlearning objectives and the names under which configurations ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from lwf_lightning.named import build_by_name
from lwf_lightning.objectives.base import Objective
from lwf_lightning.objectives.gradient_ascent import GradientAscent
from lwf_lightning.objectives.inverted_hinge import InvertedHinge
from lwf_lightning.objectives.npo import NPO, SimNPO
from lwf_lightning.objectives.replay import Replay

ObjectiveName: TypeAlias = Literal["gradient_ascent", "npo", "simnpo", "inverted_hinge", "replay"]

OBJECTIVES: dict[str, type[Objective]] = {
    "gradient_ascent": GradientAscent,
    "npo": NPO,
    "simnpo": SimNPO,
    "inverted_hinge": InvertedHinge,
    "replay": Replay,
}


def build_objective(name: str, options: Mapping[str, float] | None = None) -> Objective:
    """Builds an objective by its name.

    Args:
        name: A key of ``OBJECTIVES``.
        options: Its keyword arguments, such as ``{"beta": 0.1}``.

    Raises:
        ValueError: If the name or an option is unknown, or a value is out of range.

    Example:
        >>> build_objective("npo", {"beta": 0.5}).beta
        0.5
    """
    return build_by_name("objective", OBJECTIVES, name, options)


__all__ = [
    "NPO",
    "OBJECTIVES",
    "GradientAscent",
    "InvertedHinge",
    "Objective",
    "ObjectiveName",
    "Replay",
    "SimNPO",
    "build_objective",
]
