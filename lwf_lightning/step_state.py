"""How far a step has come, so that a checkpoint saved within it can go on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lwf_lightning.distributed import ranks_of
from lwf_lightning.forgetting.schedule import UnlearningSchedule
from lwf_lightning.random_state import random_state, restore_random_state


@dataclass
class StepPart:
    """An unlearning or a learning step that has begun, and what was there before it.

    As long as it has left the weights alone it can be done again from its beginning.
    """

    kind: str
    unlearning_steps: int
    skipped_steps: int
    random_state: dict[str, Any]
    has_changed_weights: bool = False


class StepStateMixin(L.LightningModule):
    """Counters and random state of :class:`~lwf_lightning.LWFModule`, between and within steps."""

    schedule: UnlearningSchedule
    unlearning_steps: int
    skipped_steps: int
    part: StepPart | None = None
    """What is under way; an exception leaves it here, for the checkpoint that it may bring."""
    _unlearned: tuple[int, int]  # a learning step, and how many unlearning steps before it are done
    _random_state: dict[str, Any] | None

    def begin_counting(self) -> None:
        """Counts anew."""
        self.unlearning_steps = 0
        self.skipped_steps = 0
        self.part = None
        self._unlearned = (-1, 0)
        self._random_state = None

    @contextmanager
    def step_part(self, kind: str) -> Iterator[None]:
        """Keeps what was there before the block, until it has ended well."""
        state = random_state(self.device)
        self.part = StepPart(kind, self.unlearning_steps, self.skipped_steps, state)
        yield
        self.part = None

    def changes_weights(self) -> None:
        """To be called before an optimizer's step: from now on it cannot be begun again."""
        if self.part is not None:
            self.part.has_changed_weights = True

    def step_state(self) -> dict[str, Any]:
        """For a checkpoint: the counters and the random state, as before a part under way."""
        part, (before, done) = self.part, self._unlearned
        counts: StepPart | StepStateMixin = self
        state = random_state(self.device)
        if part is not None and not part.has_changed_weights:
            counts, state = part, part.random_state
        elif part is not None and part.kind == "unlearning":  # it counts as done
            step = self.trainer.global_step
            before, done = step, (done if before == step else 0) + 1
        return {
            "unlearning_steps": counts.unlearning_steps,
            "unlearned_before": before,
            "unlearned": done,
            "skipped_steps": counts.skipped_steps,
            "random_states": ranks_of(self.trainer).gather(state),
            "saved_within": self._saved_within(),
        }

    def _saved_within(self) -> str | None:
        """Where in a step the checkpoint is saved, if a run cannot go on exactly from there."""
        if self.part is not None and self.part.has_changed_weights:
            return f"while the weights took their {self.part.kind} step"
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return "after its batch was drawn" if batches.ready > batches.processed else None

    def take_step_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`step_state` gave; that of an earlier version lacks some."""
        before = state["unlearned_before"]
        self._unlearned = before, state.get("unlearned", self.schedule.steps_before(before))
        self.unlearning_steps = state["unlearning_steps"]
        self.skipped_steps = state["skipped_steps"]
        states, rank = state["random_states"], ranks_of(self._trainer).rank
        self._random_state = states[rank] if rank < len(states) else None
        where = state.get("saved_within")
        if where and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(
                f"the checkpoint was saved within a step, {where}: the run goes on, but does not "
                "end as an uninterrupted one; that step may count twice, in part, or not at all. "
                "--ckpt_path last, or a checkpoints/step-<n>.ckpt of the run, goes on exactly"
            )

    def restore_random_state(self) -> None:
        """Has dropout go on where the checkpoint was."""
        if self._random_state is not None:
            restore_random_state(self._random_state, self.device)
            self._random_state = None
