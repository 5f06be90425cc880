"""Learning steps of an LWFModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lwf_lightning.data.batch import Batch, batches_of, padded_right
from lwf_lightning.data.training import check_lengths, warn_of_unsteady
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.distributed import gradient_sync, ranks_of
from lwf_lightning.forgetting.elicit import SelfKnowledge
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.forgetting.weights import exchanged_weights, trainable_parameters
from lwf_lightning.generation import positions_of, steady_positions_of
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.optimization import clip_gradients, labelled_token_count, share_moved
from lwf_lightning.packing import forward_passes, text_by_text
from lwf_lightning.progress import shows_progress
from lwf_lightning.ranks import Ranks
from lwf_lightning.regularizers import (
    FeaturePenalty,
    Regularizer,
    WeightPull,
    head_inputs,
    prompt_features,
)
from lwf_lightning.shards import in_step
from lwf_lightning.step_state import StepStateMixin
from lwf_lightning.token_forgetting import TokenForgetting
from lwf_lightning.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LearningMixin(StepStateMixin):
    """The learning half of :class:`~lwf_lightning.LWFModule`: one step on the learning task."""

    model: PreTrainedModel
    base_weights: dict[str, Tensor] | None
    learning_loss: TokenForgetting | None
    regularizer: Regularizer | None
    _regularizer_fisher: dict[str, Tensor] | None = None

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def takes_one_pass(self) -> bool:
        """Whether all texts of a learning step go through the model together."""
        return self.learning_loss is not None or isinstance(self.regularizer, FeaturePenalty)

    def on_fit_start(self) -> None:
        """Refuses learning texts that the model cannot take, before anything is elicited."""
        data = self._data
        if isinstance(data, LWFDataModule) and data.tokenizer is not None:
            positions = positions_of(self.model)
            texts = [text.input_ids for text in data.learning_encoded]
            what = f"the learning texts of {data.learning_task}"
            check_ids(texts, self.model, data.tokenizer, what)
            check_lengths(data.learning_encoded, positions, data.learning_task, data.max_length)
            steady = steady_positions_of(self.model)
            warn_of_unsteady(data.learning_encoded, steady, data.learning_task, data.max_length)
        self._warn_of_rounding()
        super().on_fit_start()

    def _warn_of_rounding(self) -> None:
        rates = {"learning_rate": self.hparams["learning_rate"]}
        if self.schedule.unlearns:
            scale = self.hparams["unlearning_scale"]
            rates["learning_rate times unlearning_scale"] = rates["learning_rate"] * scale
        for name, rate in rates.items():
            share = share_moved(trainable_parameters(self.model).values(), rate)
            if share < 0.5:
                rank_zero_warn(
                    f"a step of {name}, {rate:.3g}, moves {share:.1%} of the weights only: "
                    "rounding to 16 bits undoes it elsewhere. Take trainer.precision bf16-mixed "
                    "with model.init_args.dtype float32, or a higher rate"
                )

    def _is_finite(self, value: Tensor, kind: str) -> bool:
        raise NotImplementedError

    def _learn(self, batch: Batch) -> None:
        optimizers = self.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        figures = self._learning_gradient(batch)
        norm = clip_gradients(self.model.parameters(), self.hparams["max_grad_norm"])
        if self._is_finite(sum(figures.values(), norm), "learning"):
            rate = optimizer.param_groups[0]["lr"]
            self.changes_weights()
            optimizer.step()
            if (schedule := cast(Any, self.lr_schedulers())) is not None:
                schedule.step()
            # The x-axis of what this step logs: its number. Lightning's own would count batches.
            self.log("step", float(self.trainer.global_step))
            self.log("train/loss", figures.pop("train/loss"), prog_bar=True)
            self.log_dict({"train/learning_rate": rate, "train/grad_norm": norm, **figures})
        optimizer.zero_grad()

    def _learning_gradient(self, batch: Batch) -> dict[str, Tensor]:
        """Leaves the gradient of loss and regularizer in the parameters; returns their values."""
        ranks = ranks_of(self.trainer)
        if self.takes_one_pass:
            with text_by_text(self.model, batch):
                figures = self._gradient_in_one_pass(batch, ranks)
        else:
            figures = {"train/loss": self._gradient_in_passes(batch, ranks)}
        if isinstance(self.regularizer, WeightPull):
            # After the ranks have averaged theirs: it is the same on each.
            figures["train/regularizer"] = self.regularizer.add_gradient(
                trainable_parameters(self.model), self.base_weights or {}, self._regularizer_fisher
            )
        return figures

    def _gradient_in_passes(self, batch: Batch, ranks: Ranks) -> Tensor:
        tokens = ranks.sum(torch.tensor(labelled_token_count(batch), device=self.device))
        loss = torch.zeros((), device=self.device, dtype=torch.float32)
        with forward_passes(self.model, batch, self.hparams["tokens_per_pass"]) as passes:
            passes = in_step(passes, self.model.parameters())
            for number, part in enumerate(passes, start=1):
                with gradient_sync(self.trainer, number == len(passes)):
                    part_tokens = labelled_tokens(self.model, part, allow_none=True)
                    part_loss = part_tokens.token_losses().sum() / tokens
                    self.manual_backward(part_loss * ranks.world_size)  # the ranks are averaged
                loss += part_loss.detach()
        return ranks.sum(loss)

    def _gradient_in_one_pass(self, batch: Batch, ranks: Ranks) -> dict[str, Tensor]:
        """For what depends on all texts of the step together: they stay in memory together."""
        batch = padded_right(batch)  # as the model reads it: the features are looked up there
        base_losses = self._base_losses(batch, ranks) if self.learning_loss else None
        with head_inputs(self.model) as hidden:
            tokens = labelled_tokens(self.model, batch, allow_none=True)
        losses = rows_of_all(tokens.token_losses(), ranks)
        loss = mean = losses.mean()
        if self.learning_loss is not None and base_losses is not None:
            progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
            loss = self.learning_loss(losses, base_losses, progress)
        figures = {"train/loss": mean.detach()}
        if isinstance(self.regularizer, FeaturePenalty):
            penalty = self.regularizer(rows_of_all(prompt_features(hidden[0], batch), ranks))
            figures["train/regularizer"] = penalty.detach()
            loss = loss + penalty
        self.manual_backward(loss * ranks.world_size)  # the ranks are averaged
        return figures

    def _base_losses(self, batch: Batch, ranks: Ranks) -> Tensor:
        """The loss of each token of the step under the base weights, by rank.

        With the dropout of the pass that follows (on CPU and CUDA): else its noise alone would
        tell tokens apart.
        """
        base = cast(dict[str, Tensor], self.base_weights)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), exchanged_weights(self.model, base):
            tokens = labelled_tokens(self.model, batch, allow_none=True)
            return rows_of_all(tokens.token_losses(), ranks)

    def _estimate_regularizer_fisher(self) -> None:
        """Estimates the Fisher information of the self-knowledge; the model holds theta_base."""
        ranks = ranks_of(self.trainer)
        knowledge = cast(SelfKnowledge, self._data.self_knowledge)
        texts = sorted((text.encoded() for text in knowledge.texts), key=len, reverse=True)
        size = min(self._data.forget_batch_size, -(-len(texts) // ranks.world_size))
        batches = list(batches_of(texts, size, self._data.pad_token_id))
        if self.hparams["lora"]:
            rank_zero_warn(
                "model.init_args.regularizer: ewc holds half of a new LoRA adapter alone: where "
                "lora_B is 0 the loss has no gradient by lora_A, which is pulled nowhere; l2sp "
                "holds both"
            )
        with self.trainer.precision_plugin.forward_context():
            self._regularizer_fisher = diagonal_fisher(
                self.model, batches, progress=shows_progress(self.trainer), ranks=ranks
            )


def rows_of_all(rows: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks, by rank; only this one's carry a gradient.

    What each rank differentiates by its own rows is its part of the gradient of the whole.

    Args:
        rows: Shape (rows, ...), perhaps another number of rows on each rank, perhaps none.
        ranks: The processes.
    """
    if ranks.world_size == 1:
        return rows
    counts = ranks.stack(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [part[:count] for part, count in zip(ranks.stack(padded), counts, strict=True)]
    parts[ranks.rank] = rows
    return torch.cat(parts)
