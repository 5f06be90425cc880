"""Forms the gradients of a parameter in blocks that stay in cache, and hands each to a sink."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lwf_lightning.forgetting.gradient_rules import Call, DenseCall, EmbeddingCall, work_dtype
from lwf_lightning.forgetting.gradient_sinks import (
    GradientSink,
    as_matrix,
    matrix_shape,
    row_slices,
)
from lwf_lightning.forgetting.workers import Workers


class BlockWriter:
    """Writes the gradients of all texts of a batch, block by block, into memory used again.

    Args:
        parameters: The trainable parameters by name.
        sink: What takes in the blocks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sink: GradientSink) -> None:
        self._parameters = parameters
        self._sink = sink
        self._texts = 0
        self._counts = True
        self._device = next(iter(parameters.values())).device
        self._workers = Workers(self._device)
        self._blocks: dict[tuple[int, torch.dtype], Tensor] = {}

    def begin(self, texts: int, counts: bool) -> None:
        """Gets ready for a batch.

        Args:
            texts: How many it has.
            counts: Whether they count; if not, the sink is asked for what a parameter needs, and
                gets nothing.
        """
        self._texts = texts
        self._counts = counts
        self._sink.begin(texts if counts else 0)

    def close(self) -> None:
        """Ends the threads."""
        self._workers.close()

    def write_dense(self, name: str, gradient: Tensor) -> None:
        """Hands over the gradient of the only text of the batch."""
        self.write(name, [DenseCall(as_matrix(gradient.to_dense()).unsqueeze(0))])

    @torch.no_grad()
    def write(self, name: str, calls: Sequence[Call]) -> None:
        """Hands over the gradients of all texts.

        Args:
            name: Name of the parameter.
            calls: What adds up to its gradients.
        """
        parameter = self._parameters[name]
        dtype, columns = work_dtype(parameter), matrix_shape(parameter)[1]
        lookups = [call for call in calls if isinstance(call, EmbeddingCall)]
        with (
            torch.autocast(parameter.device.type, enabled=False),
            self._sink.parameter(name) as sink,
        ):
            if not self._counts:
                return
            if len(lookups) == len(calls):
                lookup = EmbeddingCall.joined(lookups) if len(lookups) > 1 else lookups[0]
                sink.take_touched(*lookup.touched(dtype))
                return
            for call in calls:
                call.prepare(dtype)

            def write(worker: int, rows: slice) -> None:
                block = self._block(worker, (self._texts, rows.stop - rows.start, columns), dtype)
                for number, call in enumerate(calls):
                    call.write(block, rows.start, add=number > 0)
                sink.take_block(rows, block)

            self._workers.run(write, row_slices(parameter, self._texts, self._workers.count))

    def _block(self, worker: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A worker's memory for a block, the same at every use."""
        elements = math.prod(shape)
        held = self._blocks.get((worker, dtype))
        if held is None or held.numel() < elements:
            held = torch.empty(elements, dtype=dtype, device=self._device)
            self._blocks[worker, dtype] = held
        return held[:elements].view(shape)
