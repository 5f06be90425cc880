"""Accuracy metrics that add up over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class _Accuracy(Metric):
    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Share of right answers, a scalar from 0 to 1, higher is better; nan without examples."""
        return self.right / self.total


class ChoiceAccuracy(_Accuracy):
    """Share of examples whose predicted choice is the right one: 0 to 1, higher is better.

    Chance is one over the number of choices.

    Example:
        >>> accuracy = ChoiceAccuracy()
        >>> accuracy.update(torch.tensor([0, 2]), torch.tensor([0, 1]))
        >>> accuracy.compute()
        tensor(0.5000)
    """

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Counts one batch.

        Args:
            predicted: Index of the predicted choice, shape (examples,).
            labels: Index of the right choice, same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        if predicted.shape != labels.shape:
            raise ValueError(
                f"shapes differ: predicted {tuple(predicted.shape)}, labels {tuple(labels.shape)}"
            )
        self.right += (predicted == labels).sum()
        self.total += labels.numel()


class ExactMatch(_Accuracy):
    """Share of examples whose answer, as read, equals the reference: 0 to 1, higher is better.

    An empty answer is never right.

    Example:
        >>> match = ExactMatch()
        >>> match.update(["72", ""], ["72", "5"])
        >>> match.compute()
        tensor(0.5000)
    """

    def update(self, answers: Sequence[str], references: Sequence[str]) -> None:
        """Counts one batch.

        Args:
            answers: What :meth:`Task.read_answer` made of the generated texts.
            references: ``Example.reference``, as many.

        Raises:
            ValueError: If there are more of one than of the other.
        """
        if len(answers) != len(references):
            raise ValueError(f"got {len(answers)} answers for {len(references)} references")
        pairs = zip(answers, references, strict=True)
        self.right += sum(bool(answer) and answer == reference for answer, reference in pairs)
        self.total += len(references)
