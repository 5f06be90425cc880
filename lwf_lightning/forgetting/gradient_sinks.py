"""What reduces the gradients that the engine forms, and the blocks in which it gets them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
"""Most elements of one block, all texts together: on a CPU, where each thread has its own block, it
stays in cache and its operations outweigh starting them; on a GPU it fills the device."""


class ParameterSink(Protocol):
    """Reduces the gradients of one parameter, for all texts of a batch.

    The parameter is seen as a matrix, see :func:`as_matrix`. The engine calls either
    :meth:`take_block` for slices that together hold every row once, perhaps from several threads
    at a time and in any order, or :meth:`take_touched` once. Gradients come in float32 (float64
    for a float64 parameter) and may be overwritten.
    """

    def take_block(self, rows: slice, gradients: Tensor) -> None:
        """Takes in some rows of every text's gradient.

        Args:
            rows: The rows.
            gradients: Shape (texts, rows, columns), contiguous.
        """

    def take_touched(self, rows: Tensor, texts: Tensor, gradients: Tensor) -> None:
        """Takes in gradients of which few rows differ from zero.

        Args:
            rows: Shape (touched,), int64, ascending.
            texts: Shape (touched,), int64: whose gradient; no pair (row, text) comes twice.
            gradients: Shape (touched, columns).
        """


class GradientSink(Protocol):
    """Reduces the gradients of texts to what is wanted of them.

    For every batch the engine calls :meth:`begin`, then :meth:`parameter` once for each parameter
    that takes part in the loss, as soon as its gradients can be formed and while the backward
    pass still runs. What a parameter needs (its Fisher information, an accumulator) is asked for
    at no other time, so a sink may gather it when the context is entered and let go of it, or
    add it up over processes, when the context is left. The contexts never overlap, and their
    order follows from model and loss alone: it is the same in every process that runs both.
    """

    def begin(self, texts: int) -> None:
        """Gets ready for a batch of this many texts, counted from 0 in the calls that follow."""

    def parameter(self, name: str) -> AbstractContextManager[ParameterSink]:
        """What takes in the gradients of a parameter; entered and left once per batch."""


def as_matrix(tensor: Tensor) -> Tensor:
    """A parameter as (rows, columns): a vector or a number is one row; more axes are columns."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """The shape of :func:`as_matrix`, also of a sharded tensor as a whole."""
    rows = tensor.shape[0] if tensor.ndim > 1 else 1
    return rows, tensor.numel() // max(1, rows)


def block_elements(tensor: Tensor) -> int:
    """Most elements of a block on the tensor's device."""
    return BLOCK_ELEMENTS.get(tensor.device.type, BLOCK_ELEMENTS["cuda"])


def row_slices(parameter: Tensor, texts: int, workers: int = 1) -> list[slice]:
    """Cuts a parameter into runs of rows that hold at most ``BLOCK_ELEMENTS`` over all texts.

    One row is never cut, however long it is.

    Args:
        parameter: The parameter.
        texts: How many texts a block holds.
        workers: How many share the runs: each gets as many as any other, but fewer of them get any
            where there is little to do.
    """
    elements = block_elements(parameter)
    rows, columns = matrix_shape(parameter)
    most = max(1, elements // max(1, texts * columns))
    workers = min(workers, math.ceil(4 * rows / most))
    shares = math.ceil(rows / (workers * most))
    step = max(1, math.ceil(rows / max(1, workers * shares)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
