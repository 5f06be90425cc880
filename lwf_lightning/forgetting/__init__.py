"""The method itself, as functions that need no Lightning."""

from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.forgetting.confidence import (
    ForgettingConfidence,
    automatic_alpha,
    forgetting_confidence,
)
from lwf_lightning.forgetting.elicit import SelfKnowledge, SelfText, elicit
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.forgetting.schedule import UnlearningSchedule
from lwf_lightning.forgetting.select import select_forget_set

__all__ = [
    "ForgettingConfidence",
    "SelfKnowledge",
    "SelfText",
    "UnlearningSchedule",
    "automatic_alpha",
    "diagonal_fisher",
    "elicit",
    "forgetting_confidence",
    "probe_anchor",
    "select_forget_set",
]
