"""The anchor: weights that solve the learning task (theta*_L of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from lwf_lightning.data.batch import Batch
from lwf_lightning.forgetting.gradients import TextLoss
from lwf_lightning.forgetting.weights import copy_weights, trainable_parameters
from lwf_lightning.losses import labelled_tokens


def probe_anchor(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    text_loss: TextLoss | None = None,
    progress: bool = False,
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

    Returns:
        One tensor per trainable parameter, of its shape and dtype.

    Raises:
        ValueError: If there is no batch, or the loss stops being finite.
    """
    if not batches:
        raise ValueError("the probe needs at least one batch of the learning task")
    training, start = model.training, copy_weights(model)
    parameters = list(trainable_parameters(model).values())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    kept_gradients = [parameter.grad for parameter in parameters]
    random_state = torch.get_rng_state()
    model.train()
    try:
        for step, batch in enumerate(tqdm(batches, desc="Probe", disable=not progress)):
            optimizer.zero_grad()
            batch = {key: value.to(device) for key, value in batch.items()}
            with torch.enable_grad():
                if text_loss is None:
                    loss = labelled_tokens(model, batch).token_losses().mean()
                else:
                    loss = text_loss(model, batch).mean()
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the probe's loss became {loss.item()} at step {step + 1}; "
                    f"lower its learning rate (now {learning_rate:g})"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            decay.step()
        return {name: parameter.data for name, parameter in trainable_parameters(model).items()}
    finally:
        torch.set_rng_state(random_state)
        for parameter, gradient in zip(parameters, kept_gradients, strict=True):
            parameter.grad = gradient
        for name, parameter in trainable_parameters(model).items():
            parameter.data = start[name]
        model.train(training)
