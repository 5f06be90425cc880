"""Unlearning steps of an LWFModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lwf_lightning.data.batch import Batch
from lwf_lightning.forgetting.weights import exchanged_weights
from lwf_lightning.generation import evaluation_mode
from lwf_lightning.losses import labelled_tokens, per_text_loss
from lwf_lightning.objectives import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnlearningMixin(L.LightningModule):
    """The unlearning half of :class:`~lwf_lightning.LWFModule`: one step on the forget set."""

    model: PreTrainedModel
    base_weights: dict[str, Tensor] | None
    objective: Objective
    unlearning_steps: int
    phase: str

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _is_finite(self, value: Tensor, kind: str) -> bool:
        raise NotImplementedError

    def _unlearn(self) -> None:
        batch = self._data.forget_batch(self.unlearning_steps)
        if batch is None:  # nothing is chosen before the first refresh
            return
        self.phase = "unlearning"
        batch = {key: value.to(self.device) for key, value in batch.items()}
        reference = self._reference(batch) if self.objective.needs_reference else None
        tokens = labelled_tokens(self.model, batch)
        losses = self.objective(tokens, reference)
        nll = tokens.per_text(tokens.token_losses().detach())
        self.unlearning_steps += 1
        if not self._is_finite(losses.detach().sum() + nll.sum(), "unlearning"):
            return
        # Per text, because a batch mean hides the one that has exploded.
        pushed = nll < self.hparams["unlearning_ceiling"]
        if not self.objective.ascends:
            pushed = torch.ones_like(pushed)
        figures = {
            "unlearn/loss": losses.detach().mean(),
            "unlearn/nll": nll.mean(),
            "unlearn/nll_highest": nll.max(),
            "unlearn/texts_pushed": pushed.sum(),
        }
        if bool(pushed.any()):
            self.manual_backward(losses.where(pushed, 0.0).sum() / len(losses))
            limit = self.hparams["unlearning_max_grad_norm"]
            figures["unlearn/grad_norm"] = clip_grad_norm_(self.model.parameters(), limit)
            optimizer = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
            if self._is_finite(figures["unlearn/grad_norm"], "unlearning"):
                optimizer.step()  # the bare optimizer: Lightning's wrapper would count a step
            optimizer.zero_grad()
        self._log_unlearning(figures)

    def _reference(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of each text under the base weights, shape (texts,)."""
        base = cast(dict[str, Tensor], self.base_weights)
        with torch.no_grad(), evaluation_mode(self.model), exchanged_weights(self.model, base):
            return per_text_loss(self.model, batch, reduction="sum")

    def _log_unlearning(self, figures: dict[str, Tensor]) -> None:
        """Logs at once: Lightning's own rhythm would miss most of these rare steps."""
        values = {name: float(value) for name, value in figures.items()}
        values["unlearn/steps"] = float(self.unlearning_steps)
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)
        self.log("unlearn/loss", values["unlearn/loss"], prog_bar=True, logger=False)
