"""The anchor: weights that solve the learning task (theta*_L of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lwf_lightning.data.batch import Batch, padded_right
from lwf_lightning.data.passes import take_texts
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.gradients import TextLoss
from lwf_lightning.forgetting.weights import copy_weights, exchange, required_parameters
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.modes import kept_modes
from lwf_lightning.optimization import can_fuse, clip_gradients, labelled_token_count
from lwf_lightning.packing import forward_passes
from lwf_lightning.random_state import random_state, restore_random_state
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import in_step


@torch.inference_mode(False)
def probe_anchor(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    text_loss: TextLoss | None = None,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Estimates theta*_L by a short plain fine-tuning, one AdamW step per batch.

    The learning rate falls linearly to zero, so that the last weights are an estimate of the
    optimum and not of one noisy step (ours; the paper does not say how theta*_L is found). The
    model itself and the random state are unchanged afterwards.

    Args:
        model: A causal LM that holds the base weights (theta_base).
        batches: Batches of the learning task (D_L), one step each, in this order.
        learning_rate: Peak learning rate, above 0.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: The gradient is clipped to this norm.
        text_loss: The loss of each text, (model, batch) -> (texts,), whose mean is minimized; by
            default the mean over all labelled tokens of the batch.
        progress: Whether to show a progress bar.
        ranks: The processes that share the texts of each batch; each holds the same model, is
            given all batches and gets the same result. By default this process is alone.

    Returns:
        One tensor per trainable parameter, of its shape and dtype.

    Raises:
        ValueError: If nothing trains, there is no batch, one has nothing to learn, or the learning
            rate is not above 0.
        NonFiniteLossError: If the loss stops being finite; a ValueError, too.
    """
    if not batches:
        raise ValueError("the probe needs at least one batch of the learning task")
    if not learning_rate > 0:
        raise ValueError(f"the probe's learning rate must be above 0, got {learning_rate}")
    ranks = ranks or Ranks()
    parameters = list(required_parameters(model).values())
    start = copy_weights(model)
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        weight_decay=weight_decay,
        fused=can_fuse(parameters) or None,
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    kept_gradients = [parameter.grad for parameter in parameters]
    drawn_so_far = random_state(device)
    try:
        with kept_modes(model):
            model.train()
            for step, batch in enumerate(
                tqdm(batches, desc="Probe", disable=not (progress and ranks.is_first))
            ):
                torch.clear_autocast_cache()  # it may hold casts of the weights before
                optimizer.zero_grad()
                terms = (
                    len(batch["labels"]) if text_loss else labelled_token_count(padded_right(batch))
                )
                if not terms:
                    raise ValueError(
                        f"batch {step + 1} of the probe has nothing to learn: no label"
                    )
                mine = ranks.share(range(len(batch["labels"])))
                # A rank without a text runs one for company: with shards the others wait for it.
                share = take_texts(batch, mine or [0])
                share = {key: value.to(device) for key, value in share.items()}
                total = ranks.sum(_backward(model, share, text_loss, bool(mine) / terms))
                if not bool(torch.isfinite(total)):
                    raise NonFiniteLossError(
                        f"the probe's loss became {total.item()} at step {step + 1}; "
                        f"lower its learning rate (now {learning_rate:g})"
                    )
                ranks.sum_gradients(parameters)
                clip_gradients(parameters, max_grad_norm)
                optimizer.step()
                decay.step()
        return start  # it will hold the probe's weights: the finally clause exchanges them
    finally:
        restore_random_state(drawn_so_far, device)
        for parameter, gradient in zip(parameters, kept_gradients, strict=True):
            parameter.grad = gradient
        exchange(model, start)


@torch.enable_grad()
def _backward(model: nn.Module, batch: Batch, text_loss: TextLoss | None, weight: float) -> Tensor:
    """Adds the gradient of the batch's weighted losses, and returns what was differentiated.

    The losses are those of tokens, or of texts with a ``text_loss``.
    """
    if text_loss is not None:
        loss = text_loss(model, batch).sum() * weight
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    total = torch.zeros((), device=batch["labels"].device, dtype=torch.float32)
    with forward_passes(model, batch) as passes:
        for part in in_step(passes, model.parameters()):
            loss = labelled_tokens(model, part, allow_none=True).token_losses().sum() * weight
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
    return total
