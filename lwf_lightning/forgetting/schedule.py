"""When to unlearn: a pure function of the learning step, the same on every process."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lwf_lightning.named import check_name

ScheduleKind: TypeAlias = Literal["periodic", "ahead", "front_loaded", "random", "never"]


@dataclass(frozen=True)
class UnlearningSchedule:
    """How many unlearning steps come before each learning step.

    Attributes:
        kind: ``periodic``: one after every ``interval`` learning steps (the paper's).
            ``ahead``: ``ahead_steps`` before the first learning step, none later (the paper's
            ablation). ``front_loaded``: ``ahead_steps`` first, then one every ``interval``
            (ours). ``random``: before each learning step with probability 1 / ``interval`` (the
            paper's ablation). ``never``: none at all.
        interval: Learning steps between two unlearning steps (N_u), at least 1.
        ahead_steps: Unlearning steps before the first learning step, at least 1.
        seed: Seed of ``random``.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> schedule = UnlearningSchedule("periodic", interval=3)
        >>> [schedule.steps_before(step) for step in range(7)]
        [0, 0, 0, 1, 0, 0, 1]
        >>> schedule = UnlearningSchedule("front_loaded", interval=3, ahead_steps=5)
        >>> [schedule.steps_before(step) for step in range(4)]
        [5, 0, 0, 1]
    """

    kind: ScheduleKind = "periodic"
    interval: int = 8
    ahead_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("schedule", self.kind, get_args(ScheduleKind))
        if self.interval < 1:
            raise ValueError(
                f"model.init_args.unlearning_interval must be at least 1, got {self.interval}"
            )
        if self.ahead_steps < 1:
            raise ValueError(
                f"model.init_args.ahead_steps must be at least 1, got {self.ahead_steps}"
            )

    @property
    def unlearns(self) -> bool:
        """Whether the schedule ever asks for an unlearning step."""
        return self.kind != "never"

    @property
    def starts_ahead(self) -> bool:
        """Whether unlearning comes before the first learning step."""
        return self.kind in ("ahead", "front_loaded")

    def steps_before(self, learning_step: int) -> int:
        """Unlearning steps due before a learning step.

        Args:
            learning_step: Learning steps done so far, at least 0.
        """
        if learning_step == 0 and self.starts_ahead:
            return self.ahead_steps
        if self.kind in ("periodic", "front_loaded"):
            return int(learning_step > 0 and learning_step % self.interval == 0)
        if self.kind == "random":
            draw = random.Random(f"{self.seed}:{learning_step}").random()
            return int(draw < 1 / self.interval)
        return 0

    def unlearns_between(self, start: int, end: int) -> bool:
        """Whether one comes before any of the learning steps from ``start`` to below ``end``.

        Example:
            >>> UnlearningSchedule("periodic", interval=8).unlearns_between(0, 8)
            False
        """
        return any(self.steps_before(step) > 0 for step in range(start, end))
