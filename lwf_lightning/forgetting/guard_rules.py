"""The rules by which unlearning is damped, paused or stopped; docs/guard.md has them in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal, TypeAlias

from lwf_lightning.metrics.fluency import Fluency

Action: TypeAlias = Literal["undo and damp", "undo and rest", "pause", "stop"]

_NORMS = 8  # behind a median: few, because ascent begins flat and then grows
_FEWEST_NORMS = 4  # with fewer there is nothing to compare with


@dataclass(frozen=True)
class GuardLimits:
    """When the guard steps in, and how far.

    Attributes:
        max_rise: Highest rise of the learning task's validation loss, as a share of the loss or of
            1 nat, whichever is more; above 0.
        max_burst_rise: The same for all unlearning steps between two learning steps together.
        max_jump: Highest rise of the unlearned texts' mean negative log-likelihood in one step, in
            nats per token; above 0.
        max_move: Highest change of the weights in one step, as a share of their norm; above 0.
        max_spike: Highest gradient norm, as a multiple of the running median or of the norm to
            which gradients are clipped, whichever is more; above 1.
        max_repetition: Highest rise of the repetition of generated texts; in (0, 1].
        min_distinct: Lowest share that may be left of the base model's distinct pairs; in [0, 1).
        damping: Factor on the learning rate of unlearning each time it is damped; in (0, 1).
        pause_steps: Learning steps of a pause, at least 1.
        max_undone: Steps undone one after the other that stop unlearning, at least 1.
        max_pauses: Pauses of a run; one more stops unlearning. At least 0.

    Raises:
        ValueError: If a value is out of range.
    """

    max_rise: float = 0.1
    max_burst_rise: float = 1.0
    max_jump: float = 5.0
    max_move: float = 0.1
    max_spike: float = 100.0
    max_repetition: float = 0.3
    min_distinct: float = 0.5
    damping: float = 0.1
    pause_steps: int = 16
    max_undone: int = 8
    max_pauses: int = 3

    def __post_init__(self) -> None:
        ranges = {
            "max_rise": (self.max_rise > 0, "above 0"),
            "max_burst_rise": (self.max_burst_rise > 0, "above 0"),
            "max_jump": (self.max_jump > 0, "above 0"),
            "max_move": (self.max_move > 0, "above 0"),
            "max_spike": (self.max_spike > 1, "above 1"),
            "max_repetition": (0 < self.max_repetition <= 1, "in (0, 1]"),
            "min_distinct": (0 <= self.min_distinct < 1, "in [0, 1)"),
            "damping": (0 < self.damping < 1, "in (0, 1)"),
            "pause_steps": (self.pause_steps >= 1, "at least 1"),
            "max_undone": (self.max_undone >= 1, "at least 1"),
            "max_pauses": (self.max_pauses >= 0, "at least 0"),
        }
        for name, (is_within, wanted) in ranges.items():
            if not is_within:
                raise ValueError(f"AscentGuard.{name} must be {wanted}, got {getattr(self, name)}")

    def halved(self) -> GuardLimits:
        """Half as much of a rise: what has to be reached again after a pause."""
        return replace(
            self,
            max_rise=self.max_rise / 2,
            max_repetition=self.max_repetition / 2,
            min_distinct=(1 + self.min_distinct) / 2,
        )


@dataclass(frozen=True)
class Breach:
    """A signal beyond its limit.

    Attributes:
        signal: What was measured, in words.
        value: What it is.
        limit: What it may be.
    """

    signal: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.signal} is {self.value:.4g}, the limit {self.limit:.4g}"


def limit_breach(signal: str, value: float, limit: float) -> Breach | None:
    """A value above its limit; NaN is above every limit.

    Example:
        >>> print(limit_breach("jump", 6.0, 5.0))
        jump is 6, the limit 5
    """
    return None if value <= limit else Breach(signal, value, limit)


def rise_breach(signal: str, before: float, after: float, max_rise: float) -> Breach | None:
    """A loss that rose too far.

    Args:
        signal: Which loss.
        before: The loss that it is compared with, in nats per token.
        after: The loss now; NaN is too far.
        max_rise: Share of ``before``, or of 1 nat, by which it may rise.

    Example:
        >>> rise_breach("loss", 0.01, 0.2, 0.25) is None
        True
        >>> print(rise_breach("loss", 4.0, 5.5, 0.25))
        loss is 5.5, the limit 5
    """
    return limit_breach(signal, after, before + max_rise * max(before, 1.0))


def spike_breach(
    signal: str, norm: float, norms: list[float], clip: float, max_spike: float
) -> Breach | None:
    """A gradient norm far above the others; norms far below the clip do no harm.

    Args:
        signal: Which gradient.
        norm: Its norm before clipping.
        norms: The norms before it; fewer than four give no verdict.
        clip: The norm to which gradients are clipped.
        max_spike: Multiple of their median, or of ``clip``, that it may reach.

    Example:
        >>> print(spike_breach("norm", 812.0, [3.0, 5.0, 4.0, 4.0], 1.0, 10))
        norm is 812, the limit 40
        >>> spike_breach("norm", 5.0, [0.01, 0.01, 0.02, 0.01], 1.0, 10) is None
        True
    """
    if len(norms) < _FEWEST_NORMS:
        return None
    return limit_breach(signal, norm, max_spike * max(median(norms), clip))


def fluency_breach(now: Fluency, base: Fluency, limits: GuardLimits) -> Breach | None:
    """Texts that repeat themselves much more than the base model's.

    Example:
        >>> base = Fluency(repetition=0.1, distinct_1=0.7, distinct_2=0.9)
        >>> print(fluency_breach(Fluency(0.9, 0.1, 0.1), base, GuardLimits()))
        repetition of generated texts is 0.9, the limit 0.4
    """
    limit = base.repetition + limits.max_repetition
    if now.repetition > limit:
        return Breach("repetition of generated texts", now.repetition, limit)
    limit = base.distinct_2 * limits.min_distinct
    if now.distinct_2 < limit:
        return Breach("distinct pairs in generated texts", now.distinct_2, limit)
    return None


@dataclass
class LossWatch:
    """Tells damage by unlearning from overfitting: a loss against its lowest, with the blame.

    Attributes:
        lowest: The lowest loss so far.
        blame: How far unlearning steps have raised the loss since then, in nats, as measured
            before and after each.

    Example:
        >>> watch = LossWatch()
        >>> watch.breach("loss", 2.0, 0.25) is None  # the first, so the lowest
        True
        >>> watch.breach("loss", 3.0, 0.25) is None  # worse, but not by unlearning
        True
        >>> watch.blame = 0.6
        >>> print(watch.breach("loss", 3.0, 0.25))
        loss is 3, the limit 2.5
    """

    lowest: float | None = None
    blame: float = 0.0

    def breach(self, signal: str, loss: float, max_rise: float) -> Breach | None:
        """Compares a new loss with the lowest; at least half of the rise must be unlearning's."""
        if self.lowest is None or loss < self.lowest:
            self.lowest, self.blame = loss, 0.0
            return None
        if self.blame < (loss - self.lowest) / 2:
            return None
        return rise_breach(signal, self.lowest, loss, max_rise)


@dataclass
class GuardState:
    """Where a guard stands: primitives only, so that a checkpoint holds all of it.

    Attributes:
        scale: Factor on unlearning's learning rate: 1, less after each damping.
        undone_in_row: Steps undone since the last that was kept.
        undone: Steps undone so far.
        pauses: Pauses so far.
        paused_until: No unlearning before this many learning steps are done.
        is_wary: Whether a pause has just ended, so that half of ``max_rise`` pauses again.
        is_stopped: Whether unlearning is over for this run.
        watched: The watched texts' loss, as it was before each burst of unlearning.
        validation: The loss of the whole validation.
        unlearning_norms: The last gradient norms of steps that were kept.
        base_fluency: Fluency of the base model.
        records: Everything done so far, a row each.
    """

    scale: float = 1.0
    undone_in_row: int = 0
    undone: int = 0
    pauses: int = 0
    paused_until: int = 0
    is_wary: bool = False
    is_stopped: bool = False
    watched: LossWatch = field(default_factory=LossWatch)
    validation: LossWatch = field(default_factory=LossWatch)
    unlearning_norms: list[float] = field(default_factory=list)
    base_fluency: Fluency | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def may_unlearn(self, step: int) -> bool:
        """Whether unlearning is neither paused nor stopped after ``step`` learning steps."""
        return not self.is_stopped and step >= self.paused_until

    def kept(self, rise: float, norm: float) -> None:
        """An unlearning step was found harmless."""
        self.undone_in_row = 0
        self.watched.blame += rise
        self.validation.blame += rise
        self.unlearning_norms = [*self.unlearning_norms, norm][-_NORMS:]

    def undo(self, step: int, limits: GuardLimits, *, damp: bool) -> Action:
        """A step is undone: with ``damp`` the next ones are smaller, else the burst is over."""
        self.undone += 1
        if not damp:
            self.paused_until = step + 1
            return "undo and rest"
        self.undone_in_row += 1
        self.scale *= limits.damping
        if self.undone_in_row >= limits.max_undone:
            self.is_stopped = True
            return "stop"
        return "undo and damp"

    def pause(self, step: int, limits: GuardLimits) -> Action:
        """No unlearning for a while, or ever again after too many pauses."""
        self.pauses += 1
        self.is_wary = True
        self.paused_until = step + limits.pause_steps
        if self.pauses > limits.max_pauses:
            self.is_stopped = True
            return "stop"
        return "pause"

    def as_primitives(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_primitives(cls, values: dict[str, Any]) -> GuardState:
        """Back from a checkpoint."""
        fluency = values["base_fluency"]
        restored = {
            "watched": LossWatch(**values["watched"]),
            "validation": LossWatch(**values["validation"]),
            "base_fluency": None if fluency is None else Fluency(**fluency),
        }
        return cls(**(values | restored))
