"""Whether a quick way through a model predicts what the model predicts of each text alone.

How a model counts positions and what it does with padding or a mask is its own affair, and its
signature does not tell: some are wrong in silence, some fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lwf_lightning.generation import evaluation_mode, unwrapped
from lwf_lightning.shards import reshard
from lwf_lightning.vocabulary import embedded_ids

Way: TypeAlias = Callable[[Any, list[list[int]]], tuple[Sequence[Sequence[int]], Tensor]]
"""From a model and texts to these or longer texts, and what the last two tokens of each predict:
logits of shape (texts, 2, vocabulary)."""

TRIAL_TOKENS = 6
"""Tokens that a text of a trial may come to have."""

_FOUND: WeakKeyDictionary[nn.Module, dict[Way, bool]] = WeakKeyDictionary()


@torch.no_grad()
def passes_trial(model: nn.Module, way: Way) -> bool:
    """Tries a way on two short texts of unequal length that begin alike; once for a model.

    It draws no random number. All processes have to ask together if the weights are sharded.

    Args:
        model: A causal LM, with or without a LoRA adapter, as the way takes it.
        way: A function of a module.

    Returns:
        Whether both texts fare as they do alone, up to rounding; not if the way fails.
    """
    found = _FOUND.setdefault(unwrapped(model), {})
    if way not in found:
        device = next(model.parameters()).device
        ids = embedded_ids(model) or 10
        texts = [[token % ids for token in text] for text in ([5, 6, 7], [5, 6, 8, 9])]
        with evaluation_mode(model), torch.autocast(device.type, enabled=False):
            alone = _alone(model, texts)  # first: where this fails it is not the way's fault
            try:
                read, together = way(model, texts)
                alone = alone if read == texts else _alone(model, read)
                found[way] = _are_close(together, alone)
            except Exception:  # whatever a model of someone else's raises
                found[way] = False
        reshard(model)
    return found[way]


def _alone(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    device = next(model.parameters()).device
    rows = [torch.tensor([text], device=device) for text in texts]
    return torch.stack([model(input_ids=row, use_cache=False).logits[0, -2:] for row in rows])


def _are_close(together: Tensor, alone: Tensor) -> bool:
    rounding = max(torch.finfo(logits.dtype).eps for logits in (together, alone)) ** 0.5
    return bool((together - alone).abs().max() <= rounding * alone.abs().max())
