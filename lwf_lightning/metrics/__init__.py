"""Metrics: functional cores, and thin ``torchmetrics`` classes over them."""

from lwf_lightning.metrics.accuracy import ChoiceAccuracy, ExactMatch
from lwf_lightning.metrics.choice import choice_log_likelihoods, predicted_choices

__all__ = ["ChoiceAccuracy", "ExactMatch", "choice_log_likelihoods", "predicted_choices"]
