"""What an unlearning step minimizes: one interface, one file per objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lwf_lightning.losses import LabelledTokens


class Objective(ABC):
    """A loss per text whose *descent* is the unlearning step.

    Attributes:
        ascends: Whether descending it raises the text's negative log-likelihood. Only the
            control, :class:`~lwf_lightning.objectives.Replay`, does not.
        needs_reference: Whether the base model's negative log-likelihood is needed.
    """

    ascends: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, tokens: LabelledTokens, reference: Tensor | None = None) -> Tensor:
        """Loss of each text.

        Args:
            tokens: The model's predictions at the labelled positions of a forget batch.
            reference: Summed negative log-likelihood of each text under the base model, in
                nats, shape (texts,); only for objectives with ``needs_reference``.

        Returns:
            Shape (texts,), to be minimized.
        """
