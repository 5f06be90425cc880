"""AscentGuard: holds unlearning back before it can destroy what is being learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lwf_lightning.callbacks.guard_signals import GuardSignals
from lwf_lightning.data.batch import Batch
from lwf_lightning.distributed import ranks_of
from lwf_lightning.forgetting.guard_rules import (
    Action,
    Breach,
    GuardLimits,
    GuardState,
    fluency_breach,
    limit_breach,
    rise_breach,
    spike_breach,
)
from lwf_lightning.forgetting.report import write_jsonl
from lwf_lightning.forgetting.weights import copy_weights, put_back, relative_change
from lwf_lightning.metrics.fluency import Fluency
from lwf_lightning.module import LWFModule
from lwf_lightning.optimization import reset_state
from lwf_lightning.runs import folder_of

_ADVICE = {
    "undo and damp": "Nothing is lost; a lower model.init_args.unlearning_scale avoids it",
    "undo and rest": "Nothing is lost; fewer ahead_steps or a lower unlearning_scale avoid it",
    "pause": "Lower model.init_args.unlearning_scale or raise unlearning_interval",
    "stop": "Lower model.init_args.unlearning_scale or set unlearning_ceiling before the next run",
}
_NO_LATER_STEP = (
    "No more is unlearned in this run: schedule ahead has no later step. Lower "
    "model.init_args.unlearning_scale or ahead_steps before the next run"
)


class AscentGuard(L.Callback):
    """Watches what unlearning does to the learning task and undoes, damps, pauses or stops it.

    Before and after each unlearning step it measures the loss of a few validation examples of the
    learning task (the *watched* loss, nats per token of the gold answers, dropout off):

    1. The step raised the watched loss by more than ``max_rise``, or the unlearned texts' negative
       log-likelihood by more than ``max_jump``, or moved the weights by more than ``max_move``: the
       step is undone (the weights are put back, the moments of unlearning's AdamW dropped), and
       unlearning's learning rate is multiplied by ``damping``. ``max_undone`` of these in a row
       stop unlearning.
    2. All steps since the last learning step together (a burst) raised the watched loss by more
       than ``max_burst_rise``: the last is undone, and there is no other before that learning step.
    3. The gradient norm of unlearning is above ``max_spike``: the step is not taken, and damped as
       in 1.
    4. The watched loss before a step, or ``val/loss``, is above its lowest by more than
       ``max_rise``, and unlearning's own steps make up at least half of that (overfitting is none
       of its business): no unlearning for ``pause_steps`` learning steps.
    5. Every ``fluency_interval`` unlearning steps a few prompts are continued greedily. They repeat
       themselves more than the base model by ``max_repetition``, or have fewer distinct pairs than
       ``min_distinct`` of its own: a pause, too.

    A pause is followed by another if the signals are not back within half of their limits; more
    than ``max_pauses`` stop unlearning. Damping lasts for the rest of the run. What was done, and
    why, is said in the log, logged as ``guard/...`` and written to ``guard.jsonl`` in the run
    folder. A run in which no rule applies is, bit for bit, the run without a guard. The copy that
    makes a step undoable is one of the trainable weights, held while the step is checked, when no
    activations are. Objective ``replay`` is not guarded: it does not ascend.

    Args:
        max_rise: Highest rise of the learning task's validation loss, as a share of the loss or of
            1 nat, whichever is more.
        max_burst_rise: The same for all unlearning steps between two learning steps together: far
            more, because many steps ahead of a task that is not learned yet do no harm to it.
        max_jump: Highest rise of the unlearned texts' mean negative log-likelihood in one step,
            nats per token.
        max_move: Highest change of the trainable weights in one step, as a share of their norm.
        max_spike: Highest gradient norm, as a multiple of the running median or of the norm to
            which gradients are clipped, whichever is more.
        max_repetition: Highest rise of the share of repeated 4-grams over the base model's.
        min_distinct: Lowest share that may be left of the base model's distinct pairs.
        damping: Factor on unlearning's learning rate each time it is damped, in (0, 1).
        pause_steps: Learning steps of a pause.
        max_undone: Steps damped and undone in a row that stop unlearning.
        max_pauses: Pauses of a run before unlearning stops.
        watched_texts: Validation examples behind the watched loss.
        fluency_interval: Unlearning steps between two looks at generated texts.
        fluency_prompts: Validation prompts to continue, beside four fixed neutral ones.
        fluency_tokens: Tokens generated for each, at most half of the model's positions.
        seed: Seed of the choice of texts and prompts.

    Attributes:
        state: Where the guard stands, ``state.records`` what it did.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        max_rise: float = 0.1,
        max_burst_rise: float = 1.0,
        max_jump: float = 5.0,
        max_move: float = 0.1,
        max_spike: float = 100.0,
        max_repetition: float = 0.3,
        min_distinct: float = 0.5,
        damping: float = 0.1,
        pause_steps: int = 16,
        max_undone: int = 8,
        max_pauses: int = 3,
        watched_texts: int = 8,
        fluency_interval: int = 8,
        fluency_prompts: int = 4,
        fluency_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        counts = {
            "watched_texts": watched_texts,
            "fluency_interval": fluency_interval,
            "fluency_prompts": fluency_prompts,
            "fluency_tokens": fluency_tokens,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"AscentGuard.{name} must be at least 1, got {count}")
        self.limits = GuardLimits(
            max_rise,
            max_burst_rise,
            max_jump,
            max_move,
            max_spike,
            max_repetition,
            min_distinct,
            damping,
            pause_steps,
            max_undone,
            max_pauses,
        )
        self.watched_texts = watched_texts
        self.fluency_interval = fluency_interval
        self.fluency_prompts = fluency_prompts
        self.fluency_tokens = fluency_tokens
        self.seed = seed
        self.state = GuardState()
        self._burst = -1  # the learning step before which unlearning goes on
        self._burst_start = self._loss = 0.0  # watched losses: before the burst, and now

    @property
    def run_arguments(self) -> dict[str, Any]:
        """The arguments: with others it is another run."""
        names = ("watched_texts", "fluency_interval", "fluency_prompts", "fluency_tokens", "seed")
        return asdict(self.limits) | {name: getattr(self, name) for name in names}

    @property
    def scale(self) -> float:
        """Factor on unlearning's learning rate: 1, less after each damping."""
        return self.state.scale

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts anew, before a checkpoint is restored, and takes the module under guard."""
        if stage != "fit":
            return
        if not isinstance(pl_module, LWFModule):
            raise TypeError(
                f"AscentGuard guards an LWFModule, not a {type(pl_module).__name__}: leave it out; "
                "LWFTrainer adds one unless ascent_guard=False (--trainer.ascent_guard false)"
            )
        self.state = GuardState()
        self._burst = -1
        guards = pl_module.schedule.unlearns and pl_module.objective.ascends
        pl_module.guard = self if guards else None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets the module go."""
        if stage == "fit":
            cast(LWFModule, pl_module).guard = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Encodes what is watched, and measures the base model's fluency."""
        module = cast(LWFModule, pl_module)
        if module.guard is not self:
            return
        self._trainer, self._module = trainer, module
        self._signals = GuardSignals(
            trainer,
            module,
            watched_texts=self.watched_texts,
            fluency_prompts=self.fluency_prompts,
            fluency_tokens=self.fluency_tokens,
            seed=self.seed,
        )
        if self.state.base_fluency is None:
            self.state.base_fluency = self._signals.base_fluency()

    def may_unlearn(self) -> bool:
        """Whether to unlearn now; looks at the watched loss before the first step of a burst."""
        step, state = self._trainer.global_step, self.state
        if not state.may_unlearn(step):
            return False
        if self._burst == step:
            return True
        limits = self.limits.halved() if state.is_wary else self.limits
        loss = self._signals.watched_loss()
        self._burst, self._burst_start, self._loss = step, loss, loss
        breach = state.watched.breach("the watched loss", loss, limits.max_rise)
        if breach is None and state.is_wary:
            breach = self._fluency_breach(limits)
        if breach is not None:
            self._record(breach, state.pause(step, self.limits))
            return False
        state.is_wary = False
        return True

    def take_step(
        self, optimizer: torch.optim.Optimizer, batch: Batch, nll: Tensor, grad_norm: Tensor
    ) -> None:
        """Takes the step, looks at what it did, and undoes it if that breaks a rule."""
        state, limits, module = self.state, self.limits, self._module
        clip = module.hparams["unlearning_max_grad_norm"]
        norm, step = self._signals.highest(float(grad_norm)), self._trainer.global_step
        signal = "the unlearning gradient's norm"
        breach = spike_breach(signal, norm, state.unlearning_norms, clip, limits.max_spike)
        if breach is not None:
            self._record(breach, state.undo(step, limits, damp=True))
            return
        before = copy_weights(module.model)
        try:
            optimizer.step()
            optimizer.zero_grad()  # its memory is needed now
            loss, jump = self._signals.watched_loss(), self._signals.jump(batch, nll)
            moved = self._signals.highest(relative_change(module.model, before))
        except BaseException:  # a checkpoint that it may bring must not hold an unjudged step
            put_back(module.model, before)
            reset_state(optimizer)
            raise
        worst = (
            limit_breach("the step's share of the weights' norm", moved, limits.max_move)
            or limit_breach("the unlearned texts' rise in loss", jump, limits.max_jump)
            or rise_breach("the watched loss after a step", self._loss, loss, limits.max_rise)
        )
        # Many small steps add up, so the burst as a whole has a limit, too.
        signal = "the watched loss after a burst"
        total = rise_breach(signal, self._burst_start, loss, limits.max_burst_rise)
        rise = loss - self._loss
        self._log(
            {
                "guard/watched_loss": loss,
                "guard/rise": rise,
                "guard/jump": jump,
                "guard/move": moved,
            }
        )
        if breach := worst or total:
            put_back(module.model, before)
            reset_state(optimizer)
            self._record(breach, state.undo(step, limits, damp=worst is not None))
            return
        state.kept(rise, norm)
        self._loss = loss
        del before  # the next look takes memory, too
        if module.unlearning_steps % self.fluency_interval == 0:
            breach = self._fluency_breach(limits)
            if breach is not None:
                self._record(breach, state.pause(step, limits))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the validation loss, where the task has one."""
        loss = trainer.callback_metrics.get("val/loss")
        # Without a fit nobody has asked which module it is.
        is_guarded = getattr(pl_module, "guard", None) is self
        if not is_guarded or trainer.sanity_checking or loss is None:
            return
        step, state = trainer.global_step, self.state
        breach = state.validation.breach("val/loss", float(loss), self.limits.max_rise)
        if breach is not None and state.may_unlearn(step):
            self._record(breach, state.pause(step, self.limits))

    def _fluency_breach(self, limits: GuardLimits) -> Breach | None:
        now = self._signals.fluency()
        self._log(
            {
                "guard/repetition": now.repetition,
                "guard/distinct_1": now.distinct_1,
                "guard/distinct_2": now.distinct_2,
            }
        )
        return fluency_breach(now, cast(Fluency, self.state.base_fluency), limits)

    def _record(self, breach: Breach, action: Action) -> None:
        step = self._trainer.global_step
        row = {
            "step": step,
            "unlearning_step": self._module.unlearning_steps,
            "action": action,
            "signal": breach.signal,
            "value": breach.value,
            "limit": breach.limit,
            "scale": self.state.scale,
        }
        self.state.records.append(row)
        damped = f" (damped to {self.scale:.3g} of unlearning_scale)" if self.scale < 1 else ""
        is_over = self._module.schedule.kind == "ahead" and action in ("pause", "undo and rest")
        advice = _NO_LATER_STEP if is_over else _ADVICE[action]
        rank_zero_info(f"AscentGuard: step {step}: {breach}: {action}. {advice}{damped}")
        self._log({"guard/actions": float(len(self.state.records))})
        folder = folder_of(self._trainer)
        if folder and ranks_of(self._trainer).is_first:
            write_jsonl(folder / "guard.jsonl", self.state.records)

    def _log(self, figures: Mapping[str, float]) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics({**figures, "guard/scale": self.scale}, self._trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        burst = [self._burst, self._burst_start, self._loss]
        return {**self.state.as_primitives(), "burst": burst}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the run was."""
        state = dict(state_dict)
        if burst := state.pop("burst", None):  # an earlier version kept none
            self._burst, self._burst_start, self._loss = burst
        self.state = GuardState.from_primitives(state)
