"""Unlearning steps of an LWFModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lwf_lightning.data.batch import Batch
from lwf_lightning.distributed import gradient_sync, ranks_of
from lwf_lightning.forgetting.weights import exchanged_weights
from lwf_lightning.generation import evaluation_mode
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.objectives import Objective
from lwf_lightning.optimization import clip_gradients
from lwf_lightning.packing import text_by_text
from lwf_lightning.ranks import Ranks
from lwf_lightning.run_length import learning_steps
from lwf_lightning.step_state import StepStateMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnlearningGuard(Protocol):
    """What may hold unlearning back; see :class:`~lwf_lightning.AscentGuard`."""

    @property
    def scale(self) -> float:
        """Factor on the learning rate of unlearning."""

    def may_unlearn(self) -> bool:
        """Whether an unlearning step may be taken now."""

    def take_step(
        self, optimizer: torch.optim.Optimizer, batch: Batch, nll: Tensor, grad_norm: Tensor
    ) -> None:
        """Takes the optimizer's step, or undoes it.

        Args:
            optimizer: Unlearning's; the gradients are there.
            batch: The texts that are pushed.
            nll: Their mean negative log-likelihoods before the step, shape (texts,).
            grad_norm: Norm of the gradient before clipping.
        """


class UnlearningMixin(StepStateMixin):
    """The unlearning half of :class:`~lwf_lightning.LWFModule`: one step on the forget set."""

    model: PreTrainedModel
    base_weights: dict[str, Tensor] | None
    objective: Objective
    guard: UnlearningGuard | None
    phase: str

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _is_finite(self, value: Tensor, kind: str) -> bool:
        raise NotImplementedError

    def choose_forget_set(self, indices: Sequence[int]) -> None:
        """Has these texts of the self-knowledge unlearned from now on: D_U."""
        self._data.set_forget_set(indices)
        texts = len(self._data.self_knowledge.texts)
        if self.hparams["unlearning_retain"] > 0 and len(indices) == texts:
            rank_zero_warn(
                "model.init_args.unlearning_retain has nothing to retain: the forget set is all of "
                f"the self-knowledge, {texts} texts. Take more data.init_args.forgetting_prompts, "
                "or have FisherCallback choose fewer, by forgetting_rate and strategy"
            )

    def _warn_without_unlearning(self, start: int) -> None:
        """Elicitation and scores would be for nothing, and the run be called what it is not."""
        steps, schedule = learning_steps(self.trainer), self.schedule
        if steps is None or not schedule.unlearns or self.unlearning_steps > 0:
            return
        if schedule.unlearns_between(start, steps):
            return
        by = "a checkpoint" if self.trainer.ckpt_path else "an earlier fit of this trainer"
        done = f", {start} of which {by} has brought along" if start else ""
        rank_zero_warn(
            "no step of this run unlearns, it learns only: model.init_args.schedule is "
            f"{schedule.kind} with unlearning_interval {schedule.interval}, and the run has "
            f"{steps} learning steps{done}. Lower unlearning_interval, or set schedule to never"
        )

    def unlearn_before(self, step: int) -> None:
        """Takes the unlearning steps that are due before a learning step, and not done yet."""
        before, done = self._unlearned
        for number in range(done if before == step else 0, self.schedule.steps_before(step)):
            with self.step_part("unlearning"):
                self._unlearn()
            self._unlearned = (step, number + 1)

    def _unlearn(self) -> None:
        batch = self._data.forget_batch(self.unlearning_steps)
        if batch is None:  # nothing is chosen before the first refresh
            return
        if self.guard is not None and not self.guard.may_unlearn():
            return
        self.phase = "unlearning"
        batch = {key: value.to(self.device) for key, value in batch.items()}
        with text_by_text(self.model, batch):
            reference = self._reference(batch) if self.objective.needs_reference else None
            tokens = labelled_tokens(self.model, batch, allow_none=True)
            losses = self.objective(tokens, reference)
            nll = tokens.per_text(tokens.token_losses().detach())
            is_text = tokens.tokens_per_text() > 0  # and not a filler
            # What is decided below is decided from the texts of all ranks, the same way on each.
            ranks = ranks_of(self.trainer)
            shown = ranks.stack(torch.stack([losses.detach().to(nll), nll, is_text.to(nll)], dim=1))
            all_losses, all_nll, _ = shown[shown[..., 2] > 0].unbind(dim=1)
            self.unlearning_steps += 1
            if not self._is_finite(all_losses.sum() + all_nll.sum(), "unlearning"):
                return
            pushed = self._is_pushed(nll) & is_text
            number_pushed = self._is_pushed(all_nll).sum()
            if int(number_pushed) > 0:
                loss = losses.where(pushed, 0.0).sum() / len(all_losses)
                kept = self._retained()
                with gradient_sync(self.trainer, kept is None):
                    self.manual_backward(loss * ranks.world_size)  # the ranks are averaged
        figures = {
            "unlearn/loss": all_losses.mean(),
            "unlearn/nll": all_nll.mean(),
            "unlearn/nll_highest": all_nll.max(),
            "unlearn/texts_pushed": number_pushed,
        }
        if int(number_pushed) > 0:
            if kept is not None:
                figures["unlearn/retained_nll"] = self._retain(kept, ranks)
            limit = self.hparams["unlearning_max_grad_norm"]
            figures["unlearn/grad_norm"] = clip_gradients(self.model.parameters(), limit)
            if self._is_finite(figures["unlearn/grad_norm"], "unlearning"):
                rows = {key: value[pushed] for key, value in batch.items()}
                self._ascend(rows, nll[pushed], figures["unlearn/grad_norm"])
            self._unlearning_optimizer.zero_grad()
        self._log_unlearning(figures)

    def _retained(self) -> Batch | None:
        if self.hparams["unlearning_retain"] == 0:
            return None
        step = self.unlearning_steps - 1  # this one is counted by now
        return cast(Batch | None, self._data.retain_batch(step))

    def _retain(self, batch: Batch, ranks: Ranks) -> Tensor:
        """Adds the gradient of the loss on what is to stay; returns that loss."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        with text_by_text(self.model, batch):
            tokens = labelled_tokens(self.model, batch, allow_none=True)
            is_text = tokens.tokens_per_text() > 0
            texts = ranks.sum(is_text.sum())
            loss = tokens.per_text(tokens.token_losses()).where(is_text, 0.0).sum() / texts
            self.manual_backward(self.hparams["unlearning_retain"] * loss * ranks.world_size)
        return ranks.sum(loss.detach())

    def _is_pushed(self, nll: Tensor) -> Tensor:
        """Per text, because a batch mean hides the one that has exploded."""
        if not self.objective.ascends:
            return torch.ones_like(nll, dtype=torch.bool)
        ceiling: float = self.hparams["unlearning_ceiling"]
        return nll < ceiling

    def _ascend(self, batch: Batch, nll: Tensor, grad_norm: Tensor) -> None:
        optimizer, guard = self._unlearning_optimizer, self.guard
        rate = self.hparams["learning_rate"] * self.hparams["unlearning_scale"]
        for group in optimizer.param_groups:  # a resumed optimizer brings its old rate along
            group["lr"] = rate if guard is None else rate * guard.scale
        self.changes_weights()
        if guard is None:
            optimizer.step()
        else:
            guard.take_step(optimizer, batch, nll, grad_norm)

    @property
    def _unlearning_optimizer(self) -> torch.optim.Optimizer:
        # The bare optimizer: Lightning's wrapper would count its steps.
        return self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]

    def _reference(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of each text under the base weights, without dropout."""
        base = cast(dict[str, Tensor], self.base_weights)
        with torch.no_grad(), evaluation_mode(self.model), exchanged_weights(self.model, base):
            tokens = labelled_tokens(self.model, batch, allow_none=True)
            return tokens.per_text(tokens.token_losses(), "sum")

    def _log_unlearning(self, figures: dict[str, Tensor]) -> None:
        """Logs at once: Lightning's own rhythm would miss most of these rare steps."""
        values = {name: float(value) for name, value in figures.items()}
        values["unlearn/steps"] = float(self.unlearning_steps)
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)
        self.log("unlearn/loss", values["unlearn/loss"], prog_bar=True, logger=False)
