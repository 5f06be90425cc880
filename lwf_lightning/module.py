"""LWFModule: holds the language model and takes one learning or unlearning step at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lwf_lightning.data.batch import Batch
from lwf_lightning.distributed import (
    check_resumable,
    check_strategy,
    prepare_to_shard,
    ranks_of,
    shard,
)
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.evaluation import EvaluationMixin
from lwf_lightning.forgetting.elicit import SelfKnowledge
from lwf_lightning.forgetting.schedule import ScheduleKind, UnlearningSchedule
from lwf_lightning.forgetting.weights import (
    copy_weights,
    exchanged_weights,
    trainable_parameters,
    whole_weights,
)
from lwf_lightning.fsdp2 import whole_state
from lwf_lightning.hyperparameters import (
    TrainingDtype,
    WithoutScores,
    changed_fields,
    check_adapter,
    check_passed_on,
    check_ranges,
    lora_config,
)
from lwf_lightning.learning import LearningMixin
from lwf_lightning.models import load_model, load_tokenizer
from lwf_lightning.objectives import ObjectiveName, build_objective
from lwf_lightning.optimization import (
    LearningRateSchedule,
    arguments_of,
    build_adamw,
    build_learning_rate_schedule,
    check_optimizers,
    take_arguments,
    take_peak_rates,
)
from lwf_lightning.regularizers import RegularizerName, WeightPull, build_regularizer
from lwf_lightning.shards import mesh_of, sharded_like
from lwf_lightning.token_forgetting import LearningLossName, build_learning_loss
from lwf_lightning.trainer_checks import check_trainer
from lwf_lightning.unlearning import UnlearningGuard, UnlearningMixin

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lwf_lightning.datamodule import LWFDataModule


class LWFModule(LearningMixin, UnlearningMixin, EvaluationMixin, L.LightningModule):
    """Fine-tunes a causal LM on the learning task and unlearns the forget set in between.

    Optimization is manual: each training batch is one learning step, before which the schedule
    may ask for unlearning steps. ``global_step``, ``max_steps``, checkpoints and curves count
    learning steps only, with forgetting on or off. With ``schedule="never"`` and
    ``regularizer=None`` the run *is* plain fine-tuning.

    Args:
        model_name: Hub name, local folder, or ``smollm2-135m``, ``world-base``, ``world-twin``.
        dtype: Type of the weights.
        attention: Attention kernel (``attn_implementation`` of transformers).
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        lora: Train low-rank adapters instead of all weights.
        trust_remote_code: Run code that comes with a Hub model. Off unless you trust it.
        learning_rate: Peak learning rate of AdamW for learning steps.
        weight_decay: Weight decay of learning steps, on matrices only.
        betas: AdamW's decay rates, for learning and unlearning.
        learning_rate_schedule: After the warm-up: constant, or to zero, linearly or by a cosine.
        warmup_ratio: Share of the learning steps over which the learning rate rises.
        max_grad_norm: The learning gradient is clipped to this norm; above 0.
        tokens_per_pass: A step's batch goes through the model in passes whose gradients add up to
            the same step, without padding where the model allows; a pass holds at most so many
            tokens, padding included, but at least one text. None: as many as are quickest.
        learning_loss: What a learning step minimizes: ``cross_entropy`` per answer token, or
            ``token_forgetting``; see :class:`~lwf_lightning.token_forgetting.TokenForgetting`.
        learning_loss_options: Options of ``token_forgetting``, such as ``{"share_kept": 0.7}``.
        regularizer: What is added to the learning loss: ``l2sp``, a gentle pull to the base
            weights (ours, docs/results.md); ``bss`` or ``ewc``, see
            :mod:`lwf_lightning.regularizers`; or None, as in the paper. ``srs`` is an empty slot.
        regularizer_options: Options of the regularizer, such as ``{"strength": 0.01}``.
        schedule: When to unlearn; see :class:`~lwf_lightning.forgetting.UnlearningSchedule`.
        unlearning_interval: Learning steps between two unlearning steps (N_u of the paper).
        ahead_steps: Unlearning steps before the first learning step, for ``ahead`` and
            ``front_loaded``.
        objective: What an unlearning step minimizes; ``replay`` is the control that rehearses
            the forget set instead.
        objective_options: Options of the objective, such as ``{"beta": 0.1}`` for ``npo``.
        unlearning_scale: Learning rate of unlearning steps as a multiple of ``learning_rate``
            (the ascent weight; AdamW would cancel a factor on the loss). It is not scheduled.
        unlearning_max_grad_norm: The unlearning gradient is clipped to this norm; above 0.
        unlearning_ceiling: A text whose mean negative log-likelihood (nats per token) has
            reached this is not pushed further.
        unlearning_retain: Weight of the mean loss on up to ``forget_batch_size`` texts of the
            self-knowledge that are not to be forgotten, which an unlearning step minimizes beside
            its objective (gradient difference, arXiv 2401.06121): what the two share stays. 0 takes
            the paper's step.
        without_scores: What to do if no FisherCallback chooses the forget set: ``refuse`` to
            start, or unlearn all (``use_all``) self-knowledge.
        max_skipped_steps: A step whose loss or gradient is NaN or infinite is skipped and
            counted; one more than this many in a run stop it.
        seed: Seed of the ``random`` schedule.

    Raises:
        ValueError: If a value is out of range.
    """

    model: PreTrainedModel
    base_weights: dict[str, Tensor] | None = None
    """The trainable weights before the run (theta_base); kept only if something needs them."""

    def __init__(
        self,
        model_name: str = "smollm2-135m",
        *,
        dtype: TrainingDtype = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        lora: LoraConfig | None = None,
        trust_remote_code: bool = False,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        learning_rate_schedule: LearningRateSchedule = "cosine",
        warmup_ratio: float = 0.01,
        max_grad_norm: float = 1.0,
        tokens_per_pass: int | None = None,
        learning_loss: LearningLossName = "cross_entropy",
        learning_loss_options: dict[str, float] | None = None,
        regularizer: RegularizerName | None = "l2sp",
        regularizer_options: dict[str, float] | None = None,
        schedule: ScheduleKind = "periodic",
        unlearning_interval: int = 8,
        ahead_steps: int = 20,
        objective: ObjectiveName = "gradient_ascent",
        objective_options: dict[str, float] | None = None,
        unlearning_scale: float = 0.1,
        unlearning_max_grad_norm: float = 1.0,
        unlearning_ceiling: float = 5.0,
        unlearning_retain: float = 0.0,
        without_scores: WithoutScores = "refuse",
        max_skipped_steps: int = 10,
        seed: int = 0,
    ) -> None:
        passed = dict(locals())
        super().__init__()
        self.automatic_optimization = False
        self.lora = lora_config(lora)
        self.save_hyperparameters(ignore=["lora"])
        check_passed_on(self.hparams, passed, type(self).__name__)
        self.hparams["lora"] = None if self.lora is None else changed_fields(self.lora)
        check_ranges(self.hparams)
        self.schedule = UnlearningSchedule(schedule, unlearning_interval, ahead_steps, seed)
        self.objective = build_objective(objective, objective_options)
        self.learning_loss = build_learning_loss(learning_loss, learning_loss_options)
        self.regularizer = (
            None if regularizer is None else build_regularizer(regularizer, regularizer_options)
        )
        self.begin_counting()
        self.phase = "learning"
        self.guard: UnlearningGuard | None = None
        self._arguments: list[list[dict[str, Any]]] = []  # of each optimizer
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded at the first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.hparams["model_name"], trust_remote_code=self.hparams["trust_remote_code"]
            )
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Starts to count anew for a fit; a checkpoint is restored after this."""
        if stage == "fit":
            check_trainer(self.trainer)
            self.begin_counting()

    def configure_model(self) -> None:
        """Loads the model, once."""
        if hasattr(self, "model"):
            return
        if self._trainer is not None:
            check_strategy(self.trainer)
            prepare_to_shard(self.trainer)
        self.model = self.load_whole_model()
        if self._trainer is not None:
            shard(self.model, self.trainer)
        if self.needs_base_weights:
            # Before a checkpoint is restored: these stay the base weights of a run that goes on.
            self.base_weights = copy_weights(self.model)

    @property
    def needs_base_weights(self) -> bool:
        """Whether the run, or one that goes on from its checkpoint, looks back at theta_base."""
        compares = self.learning_loss is not None or isinstance(self.regularizer, WeightPull)
        # An adapter starts at random: from a checkpoint without its start nobody finds it again.
        return self.schedule.unlearns or compares or self.lora is not None

    @property
    def needs_self_knowledge(self) -> bool:
        """Whether the run has the base model answer the forgetting prompts."""
        pull = self.regularizer
        return self.schedule.unlearns or (isinstance(pull, WeightPull) and pull.needs_fisher)

    def load_whole_model(self) -> PreTrainedModel:
        """The model as it is before training, in main memory."""
        return load_model(  # type: ignore[return-value]  # PEFT's wrapper behaves as one
            self.hparams["model_name"],
            dtype=self.hparams["dtype"],
            attention=self.hparams["attention"],
            gradient_checkpointing=self.hparams["gradient_checkpointing"],
            lora=self.lora,
            trust_remote_code=self.hparams["trust_remote_code"],
        )

    def whole_model(self) -> PreTrainedModel | None:
        """The model with all its weights: itself, or put together on rank 0 if it is sharded.

        All ranks have to call it; on the others it is None if it is sharded.
        """
        if mesh_of(self.model.parameters()) is None:
            return self.model
        state = whole_state(self.model)
        if not self.trainer.is_global_zero:
            return None
        model = self.load_whole_model()
        model.load_state_dict(state)
        return model

    def configure_optimizers(self) -> Any:
        """AdamW for learning with its schedule; if the run unlearns, another for unlearning.

        An override returns the like; it may leave out the schedule.
        """
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < float("inf"):  # -1: epochs of a loader without a length
            raise ValueError(
                "how many steps the run has is not known: set trainer.max_steps, or "
                "trainer.max_epochs where the training loader has a length"
            )
        betas: tuple[float, float] = tuple(self.hparams["betas"])
        learning = build_adamw(
            self.model.parameters(),
            learning_rate=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
            betas=betas,
        )
        schedule = build_learning_rate_schedule(
            learning,
            self.hparams["learning_rate_schedule"],
            learning_steps=int(steps),
            warmup_ratio=self.hparams["warmup_ratio"],
        )
        by_step = {"scheduler": schedule, "interval": "step"}
        if not self.schedule.unlearns:
            return [learning], [by_step]
        # Its own moments: an ascent step through learning's would pollute both.
        unlearning = build_adamw(
            self.model.parameters(),
            learning_rate=self.hparams["learning_rate"] * self.hparams["unlearning_scale"],
            weight_decay=0.0,
            betas=betas,
        )
        return [learning, unlearning], [by_step]

    def on_fit_start(self) -> None:
        """Elicits the self-knowledge from the base weights; the cache makes that quick again."""
        super().on_fit_start()
        check_optimizers(self.trainer, unlearns=self.schedule.unlearns)
        # Before a checkpoint brings those of its run along.
        self._arguments = [arguments_of(optimizer) for optimizer in self.trainer.optimizers]
        if not self.needs_base_weights:
            return
        if self.trainer.ckpt_path is None:  # the module may have been trained or loaded by now
            self.base_weights = copy_weights(self.model)
        if self.base_weights is None:
            raise ValueError(
                "the base weights are missing: let configure_model load the model, or look back at "
                "none with schedule never and regularizer null"
            )
        self._place_base_weights()
        ranks_of(self.trainer).copy_first(self.base_weights.values())
        if not self.needs_self_knowledge:
            return
        if not hasattr(self._data, "self_knowledge"):
            raise TypeError(
                "unlearning and regularizer 'ewc' need a datamodule with self-knowledge, such as "
                f"LWFDataModule; got {type(self._data).__name__}"
            )
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        is_scored = any(getattr(callback, "chooses_forget_set", False) for callback in callbacks)
        if self.schedule.unlearns and not is_scored and self.hparams["without_scores"] == "refuse":
            raise ValueError(
                "nothing chooses what to forget: add lwf_lightning.FisherCallback to "
                "trainer.callbacks, or set model.init_args.without_scores to use_all, or "
                "model.init_args.schedule to never"
            )
        self._warn_without_unlearning(0)
        with exchanged_weights(self.model, self.base_weights):
            self._data.elicit_self_knowledge(self.model)
            if isinstance(self.regularizer, WeightPull) and self.regularizer.needs_fisher:
                self._estimate_regularizer_fisher()
        if self.schedule.unlearns and not is_scored:
            knowledge = cast(SelfKnowledge, self._data.self_knowledge)
            self.choose_forget_set(range(len(knowledge.texts)))

    def on_train_start(self) -> None:
        """Has a resumed run follow its own arguments, and dropout go on where it was."""
        if start := self.trainer.global_step:
            if self.trainer.ckpt_path is None:
                rank_zero_warn(
                    f"this trainer has fitted before: its steps count on from {start}, but data, "
                    "learning rate and forgetting begin anew. To go on with a run that was cut off "
                    "give ckpt_path='last'; to begin another make another trainer"
                )
            self._warn_without_unlearning(start)
        for optimizer, arguments in zip(self.trainer.optimizers, self._arguments, strict=True):
            take_arguments(optimizer, arguments)
        schedule = self.lr_schedulers()
        if isinstance(schedule, LambdaLR):
            take_peak_rates(schedule)
        self.restore_random_state()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Takes the unlearning steps that are due, then one learning step."""
        self.phase = "learning"
        self.unlearn_before(self.trainer.global_step)
        with self.step_part("learning"):
            self._learn(batch)

    def _is_finite(self, value: Tensor, kind: str) -> bool:
        if bool(torch.isfinite(value)):
            return True
        self.skipped_steps += 1
        self.log("step", float(self.trainer.global_step))
        self.log("train/skipped_steps", float(self.skipped_steps))
        limit = self.hparams["max_skipped_steps"]
        if self.skipped_steps > limit:
            raise NonFiniteLossError(
                f"{self.skipped_steps} steps had a NaN or infinite loss or gradient, the last a "
                f"{kind} step after {self.trainer.global_step} learning steps. Lower "
                "model.init_args.learning_rate or unlearning_scale and go on from the last "
                "checkpoint by its file (--ckpt_path <file>: with another rate, `last` begins "
                "another run), or allow more with model.init_args.max_skipped_steps"
            )
        return False

    @property
    def _data(self) -> LWFDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters and the random state."""
        checkpoint["lwf"] = {
            **self.step_state(),
            "is_sharded": mesh_of(self.model.parameters()) is not None,
            "base_weights": None if self.lora is None else whole_weights(self.base_weights or {}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the counters and the random state back."""
        if "lwf" not in checkpoint:
            raise ValueError(
                "the checkpoint was not made by LWFModule: give one that was, or load its weights "
                "as model.init_args.model_name"
            )
        state = checkpoint["lwf"]
        check_resumable(self._trainer, state)
        check_adapter(state["base_weights"] is not None, self.lora)
        self.take_step_state(state)
        if state["base_weights"]:
            self.base_weights = dict(state["base_weights"])
            if hasattr(self, "model"):  # which some strategies have cut into shards by now
                self._place_base_weights()

    def _place_base_weights(self) -> None:
        """Follows where the strategy has moved, cast or cut the model."""
        base = self.base_weights or {}
        for name, parameter in trainable_parameters(self.model).items():
            if name in base:
                base[name] = sharded_like(base[name], parameter).to(parameter)
