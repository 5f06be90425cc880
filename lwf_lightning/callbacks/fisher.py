"""FisherCallback: decides when the Fisher information is estimated and what is to be forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lwf_lightning.callbacks.base_weights import BaseWeights
from lwf_lightning.callbacks.fisher_arguments import Anchor, check_arguments
from lwf_lightning.callbacks.refresh_data import fisher_batches, probe_batches, scoring_batches
from lwf_lightning.callbacks.refresh_report import (
    log_refresh,
    memory_of_refresh,
    read_tensors,
    write_tensors,
)
from lwf_lightning.callbacks.refresh_timing import warn_if_late
from lwf_lightning.data.batch import Batch
from lwf_lightning.distributed import ranks_of
from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.forgetting.confidence import (
    ForgettingConfidence,
    TextStep,
    forgetting_confidence,
)
from lwf_lightning.forgetting.fisher import FisherEstimator, diagonal_fisher
from lwf_lightning.forgetting.gradients import TextLoss
from lwf_lightning.forgetting.probe_cache import shared_probe
from lwf_lightning.forgetting.select import SelectionStrategy, select_forget_set
from lwf_lightning.forgetting.weights import exchanged_weights, trainable_parameters
from lwf_lightning.losses import Reduction
from lwf_lightning.module import LWFModule
from lwf_lightning.progress import shows_progress


class FisherCallback(L.Callback):
    """Estimates the Fisher information, scores the self-knowledge and selects the forget set.

    A refresh happens before the learning step for which :meth:`should_refresh` says so; override
    that method for another timing. With an :class:`~lwf_lightning.LWFModule` and its datamodule
    everything is found by itself. In another project give ``learning_batches`` and
    ``forget_batches``; the LightningModule holds its language model as ``model`` and may have a
    method ``per_text_loss(batch)`` of shape (texts,), text i depending on row i only (see
    :data:`~lwf_lightning.forgetting.gradients.TextLoss`); then read ``forget_set`` after a refresh.

    Args:
        anchor: Where theta*_L, the weights that solve the learning task, come from. ``probe``: a
            short plain fine-tuning before the first learning step (the paper's two-stage
            reading). ``online``: the current weights at each refresh (ours); nothing is
            unlearned before the first one.
        refresh_interval: Steps between refreshes, as ``global_step`` counts: learning steps, in
            another project those of its optimizers. For ``online``; a probe does not change.
        estimator: ``empirical`` Fisher takes the gold answers, ``true`` samples answers from the
            model.
        fisher_texts: Texts of the learning task behind the Fisher estimate, at least 1.
        reduction: Whether a text's loss is the mean or the sum over its answer tokens.
        text_step: Whether a text's own step is its gradient (the paper's) or has ``unit`` length;
            see :func:`~lwf_lightning.forgetting.forgetting_confidence`.
        alpha: Step size of the text's own gradient step (alpha of the paper); None chooses it
            from the scores' spread, see :func:`~lwf_lightning.forgetting.automatic_alpha`.
        strategy: Which texts to forget; see :func:`~lwf_lightning.forgetting.select_forget_set`.
        forgetting_rate: Share of the self-knowledge to forget, in (0, 1].
        threshold: Lowest confidence to forget, for strategy ``threshold``.
        probe_steps: Steps of the probe, at least 1.
        probe_learning_rate: Its peak learning rate; None takes the module's ``learning_rate``.
        probe_batch_size: Texts per step of the probe.
        probe_folder: Folder that keeps the probe for other runs with the same base weights,
            learning texts and probe settings; each takes as much room as what trains of the
            model. None keeps nothing.
        batch_size: Texts per backward pass of Fisher and scoring; changes memory and speed only.
        save_tensors: Whether Fisher and anchor are written to ``fisher/step-<n>.safetensors`` in
            the run folder at each refresh, 8 bytes per trainable parameter in float32.
        seed: Seed of the texts behind Fisher and probe, of ``true`` and of ``random``.
        learning_batches: Batches of the learning task, in another project.
        forget_batches: Batches of self-knowledge to score, in another project.

    Attributes:
        scores: Alignment, sensitivity and confidence of the last refresh, one value per text.
        forget_set: Indices of the texts to forget, highest confidence first.
        refreshed_at: The learning step before which the last refresh took place.
        tensors_file: Where the last Fisher and anchor lie, if they were saved.

    Raises:
        ValueError: If a value is out of range or two do not fit together.
    """

    chooses_forget_set = True
    _fits = True

    def __init__(
        self,
        anchor: Anchor = "probe",
        refresh_interval: int | None = None,
        *,
        estimator: FisherEstimator = "empirical",
        fisher_texts: int = 64,
        reduction: Reduction = "mean",
        text_step: TextStep = "unit",
        alpha: float | None = None,
        strategy: SelectionStrategy = "highest",
        forgetting_rate: float = 0.125,
        threshold: float | None = None,
        probe_steps: int = 64,
        probe_learning_rate: float | None = None,
        probe_batch_size: int = 16,
        probe_folder: str | None = None,
        batch_size: int = 8,
        save_tensors: bool = True,
        seed: int = 0,
        learning_batches: Sequence[Batch] | None = None,
        forget_batches: Sequence[Batch] | None = None,
    ) -> None:
        self.anchor = anchor
        self.refresh_interval = refresh_interval
        self.estimator = estimator
        self.fisher_texts = fisher_texts
        self.reduction = reduction
        self.text_step: TextStep = text_step
        self.alpha = alpha
        self.strategy = strategy
        self.forgetting_rate = forgetting_rate
        self.threshold = threshold
        self.probe_steps = probe_steps
        self.probe_learning_rate = probe_learning_rate
        self.probe_batch_size = probe_batch_size
        self.probe_folder = probe_folder
        self.batch_size = batch_size
        self.save_tensors = save_tensors
        self.seed = seed
        self.learning_batches = learning_batches
        self.forget_batches = forget_batches
        check_arguments(vars(self))

        self.scores: ForgettingConfidence | None = None
        self.forget_set: list[int] | None = None
        self.refreshed_at = -1
        self._asked_at: int | None = None  # the step before which it was last considered
        self.tensors_file: str | None = None
        self._base_weights: dict[str, Tensor] | None = None
        self._foreign_base: BaseWeights | None = None

    @property
    def run_arguments(self) -> dict[str, Any]:
        """The arguments that change the result, so that with others it is another run."""
        free = {"probe_folder", "batch_size", "save_tensors", "learning_batches", "forget_batches"}
        names = inspect.signature(FisherCallback).parameters.keys() - free
        return {name: getattr(self, name) for name in names}

    def should_refresh(self, step: int) -> bool:
        """Whether to refresh before a learning step; override it for another timing.

        Args:
            step: Learning steps done so far, ``trainer.global_step``.
        """
        if self.refresh_interval is None:
            return self.refreshed_at < 0
        # A batch for which several optimizers step may jump over the multiple itself.
        before = step - 1 if self._asked_at is None else self._asked_at
        return step // self.refresh_interval > max(before, 0) // self.refresh_interval

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets an earlier fit, before a checkpoint is restored.

        Has the base weights of another project's module kept; an LWFModule keeps its own.
        """
        self._fits = stage == "fit"
        if not self._fits:
            return
        self.scores = self.forget_set = self.tensors_file = None
        self.refreshed_at = -1
        self._asked_at = None
        self._base_weights = self._foreign_base = None
        if not isinstance(pl_module, LWFModule):
            if not isinstance(getattr(pl_module, "model", None), torch.nn.Module):
                raise TypeError(
                    f"{type(pl_module).__name__} must hold its language model as `model` before "
                    "FisherCallback is set up"
                )
            self._foreign_base = BaseWeights(pl_module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Knows by it that the weights loaded last were those of a checkpoint."""
        if self._foreign_base is not None:
            self._foreign_base.restored()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the base weights from Lightning's finders, which save, train and load."""
        if self._foreign_base is not None:  # not begun: finders come before the other callbacks
            self._foreign_base.keep(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks timing and data, and says how much memory Fisher and anchor will take."""
        if _is_plain(pl_module):
            return
        if isinstance(pl_module, LWFModule):
            if self.forget_batches is not None:  # the scores would be of other texts
                raise ValueError(
                    "FisherCallback's forget_batches are for a module of your own: an LWFModule "
                    "unlearns the self-knowledge of its datamodule; leave them out"
                )
            if pl_module.schedule.starts_ahead and not self.should_refresh(0) and not self.scores:
                raise ValueError(
                    f"schedule {pl_module.schedule.kind!r} unlearns before the first learning "
                    f"step, but anchor {self.anchor!r} chooses nothing until step "
                    f"{self.refresh_interval}: take anchor 'probe' or schedule 'periodic'"
                )
        elif self.learning_batches is None or self.forget_batches is None:
            raise ValueError(
                "FisherCallback needs `learning_batches` and `forget_batches` with a "
                f"{type(pl_module).__name__}"
            )
        is_own_timing = type(self).should_refresh is not FisherCallback.should_refresh
        if self.refresh_interval is not None and self.scores is None and not is_own_timing:
            warn_if_late(trainer, pl_module, self.refresh_interval)
        has_own_loss = hasattr(pl_module, "per_text_loss")
        if self.probe_folder and (has_own_loss or not isinstance(pl_module, LWFModule)):
            raise ValueError(
                f"FisherCallback's probe_folder cannot know what a {type(pl_module).__name__} "
                "minimizes: leave it out"
            )
        parameters = trainable_parameters(pl_module.model)  # type: ignore[arg-type]
        if self._foreign_base is not None:
            self._base_weights = self._foreign_base.placed(pl_module)
            self._foreign_base = None
        ranks_of(trainer).copy_first((self._base_weights or {}).values())
        saved = self.save_tensors and not trainer.fast_dev_run  # type: ignore[attr-defined]
        rank_zero_info(f"FisherCallback: {memory_of_refresh(parameters, saved)}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes if it is time."""
        step = trainer.global_step
        if _is_plain(pl_module):
            return
        if step != self.refreshed_at and self.should_refresh(step):
            self.refresh(trainer, pl_module)
        self._asked_at = step

    def refresh(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimates Fisher and anchor, scores the self-knowledge and selects the forget set."""
        model: torch.nn.Module = pl_module.model  # type: ignore[assignment]
        base = pl_module.base_weights if isinstance(pl_module, LWFModule) else self._base_weights
        if base is None:
            raise ValueError("the base weights are missing: refresh only within Trainer.fit")
        foreign_loss = getattr(pl_module, "per_text_loss", None)
        text_loss = None if foreign_loss is None else lambda _, batch: foreign_loss(batch)
        ranks = ranks_of(trainer)
        data: Any = getattr(trainer, "datamodule", None)
        learning, forgetting, places = self.learning_batches, self.forget_batches, None
        if learning is None:
            learning = fisher_batches(data, self.fisher_texts, self.batch_size, self.seed, ranks)
        if forgetting is None:
            forgetting, places = scoring_batches(data, self.batch_size, ranks)
        with trainer.precision_plugin.forward_context():
            probed = None
            if self.anchor == "probe":
                with exchanged_weights(model, base):
                    probed = self._probe(trainer, pl_module, text_loss)
            with nullcontext() if probed is None else exchanged_weights(model, probed):
                fisher = diagonal_fisher(
                    model,
                    learning,
                    estimator=self.estimator,
                    reduction=self.reduction,
                    seed=self.seed,
                    text_loss=text_loss,
                    progress=shows_progress(trainer),
                    ranks=ranks,
                )
            with exchanged_weights(model, base) as current:
                anchor = current if probed is None else probed
                self.scores = forgetting_confidence(
                    model,
                    forgetting,
                    fisher=fisher,
                    anchor=anchor,
                    alpha=self.alpha,
                    text_step=self.text_step,
                    reduction=self.reduction,
                    text_loss=text_loss,
                    progress=shows_progress(trainer),
                    ranks=ranks,
                )
                if places is not None:
                    self.scores = self.scores.reordered(places)
                if self.save_tensors:
                    self.tensors_file = write_tensors(trainer, fisher, anchor)
        self.forget_set = self.choose(self.scores.confidence)
        if not self.forget_set:
            rank_zero_warn(
                "nothing is forgotten: no text's confidence reaches FisherCallback's threshold "
                f"{self.threshold}: the highest is {float(self.scores.confidence.max()):.3g}"
            )
        self.refreshed_at = trainer.global_step
        if isinstance(pl_module, LWFModule):
            pl_module.choose_forget_set(self.forget_set)
        log_refresh(trainer, self.scores, self.forget_set)

    def choose(self, confidence: Tensor) -> list[int]:
        """Which texts this callback forgets at such scores, highest confidence first."""
        chosen = select_forget_set(
            confidence,
            strategy=self.strategy,
            forgetting_rate=self.forgetting_rate,
            threshold=self.threshold,
            seed=self.seed,
        )
        return [int(index) for index in chosen]

    def load_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Reads Fisher and anchor of the last refresh back from disk.

        Returns:
            Two mappings from parameter name to tensor: the Fisher and the anchor.

        Raises:
            ValueError: If none were saved or the file is damaged.
        """
        if self.tensors_file is None:
            raise ValueError(
                "no Fisher was saved: there was no refresh, save_tensors is off, or fast_dev_run on"
            )
        return read_tensors(self.tensors_file)

    def _probe(
        self, trainer: L.Trainer, pl_module: L.LightningModule, text_loss: TextLoss | None
    ) -> dict[str, Tensor]:
        """Computes the probe, or finds that of an earlier run; the model holds the base weights."""
        model: torch.nn.Module = pl_module.model  # type: ignore[assignment]
        batches = self._probe_batches(getattr(trainer, "datamodule", None))
        rate, ranks = self._probe_rate(pl_module), ranks_of(trainer)

        def compute() -> dict[str, Tensor]:
            return probe_anchor(
                model,
                batches,
                learning_rate=rate,
                text_loss=text_loss,
                progress=shows_progress(trainer),
                ranks=ranks,
            )

        if self.probe_folder is None:
            return compute()
        settings = {"learning_rate": rate, "precision": str(trainer.precision)}
        return shared_probe(self.probe_folder, model, batches, settings, compute, ranks=ranks)

    def _probe_rate(self, pl_module: L.LightningModule) -> float:
        rate = self.probe_learning_rate
        if rate is None:
            rate = pl_module.hparams.get("learning_rate")
        if rate is None:
            raise ValueError("give FisherCallback a probe_learning_rate: the module has none")
        return float(rate)

    def _probe_batches(self, data: Any) -> Sequence[Batch]:
        given = self.learning_batches
        if given is None:
            return probe_batches(data, self.probe_steps, self.probe_batch_size, self.seed)
        return [given[step % len(given)] for step in range(self.probe_steps)]

    def state_dict(self) -> dict[str, Any]:
        """Primitives and small tensors; Fisher and anchor stay in their own file."""
        scores = self.scores
        return {
            "scores": None
            if scores is None
            else {
                "alignment": scores.alignment.cpu(),
                "sensitivity": scores.sensitivity.cpu(),
                "alpha": scores.alpha,
                "constant": scores.constant,
            },
            "forget_set": self.forget_set,
            "refreshed_at": self.refreshed_at,
            "asked_at": self._asked_at,
            "tensors_file": self.tensors_file,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state back in a fit; a Fisher file is only needed to be looked at."""
        if not self._fits:  # a test of another run's checkpoint says nothing of this one
            return
        scores = state_dict["scores"]
        self.scores = None if scores is None else ForgettingConfidence(**scores)
        self.forget_set = state_dict["forget_set"]
        self.refreshed_at = state_dict["refreshed_at"]
        self._asked_at = state_dict.get("asked_at")  # which checkpoints of before lack
        self.tensors_file = state_dict["tensors_file"]
        if self.tensors_file is not None and not Path(self.tensors_file).exists():
            rank_zero_warn(
                f"{self.tensors_file} is gone: the run goes on with its scores, but the Fisher "
                "of the last refresh cannot be looked at"
            )
            self.tensors_file = None


def _is_plain(pl_module: L.LightningModule) -> bool:
    return isinstance(pl_module, LWFModule) and not pl_module.schedule.unlearns
