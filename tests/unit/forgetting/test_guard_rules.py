from __future__ import annotations

import json
from typing import Any

import pytest

from lwf_lightning.forgetting.guard_rules import (
    GuardLimits,
    GuardState,
    LossWatch,
    fluency_breach,
    rise_breach,
    spike_breach,
)
from lwf_lightning.metrics.fluency import Fluency

LIMITS = GuardLimits()


@pytest.mark.parametrize(
    ("before", "after", "is_breach"),
    [(4.0, 5.0, False), (4.0, 5.01, True), (0.1, 0.34, False), (0.1, 0.36, True)],
)
def test_a_rise_is_relative_above_one_nat(before: float, after: float, is_breach: bool) -> None:
    assert (rise_breach("loss", before, after, 0.25) is not None) == is_breach


def test_nan_is_a_breach_of_every_rule() -> None:
    nan = float("nan")
    assert rise_breach("loss", 1.0, nan, 0.25)
    assert spike_breach("norm", nan, [1.0] * 4, 1.0, 10)


def test_a_spike_needs_norms_to_compare_with_and_a_norm_above_the_clip() -> None:
    assert spike_breach("norm", 1e9, [1.0] * 3, 1.0, 10) is None
    assert spike_breach("norm", 11.0, [1.0] * 4, 1.0, 10)
    assert spike_breach("norm", 9.0, [1e-3] * 4, 1.0, 10) is None


def test_the_growth_of_a_greedy_texts_gradient_is_no_spike() -> None:
    """Norms of the embedded world's ten first unlearning steps: from flat to clipped."""
    grown = [0.03, 0.05, 0.04, 0.4, 0.5, 0.6, 4.0, 3.0]
    assert spike_breach("norm", 28.1, grown, 1.0, LIMITS.max_spike) is None
    assert spike_breach("norm", 2800.0, grown, 1.0, LIMITS.max_spike)


def test_overfitting_is_not_blamed_on_unlearning() -> None:
    watch = LossWatch()
    assert watch.breach("loss", 1.0, 0.25) is None
    assert watch.breach("loss", 3.0, 0.25) is None
    watch.blame = 0.9  # less than half of the two nats
    assert watch.breach("loss", 3.0, 0.25) is None
    watch.blame = 1.1
    assert watch.breach("loss", 3.0, 0.25)
    assert watch.breach("loss", 0.9, 0.25) is None
    assert watch.blame == 0.0


def test_fluency_is_compared_with_the_base_model() -> None:
    base = Fluency(repetition=0.2, distinct_1=0.5, distinct_2=0.8)
    assert fluency_breach(base, base, LIMITS) is None
    assert fluency_breach(Fluency(0.51, 0.5, 0.8), base, LIMITS)
    assert fluency_breach(Fluency(0.2, 0.5, 0.39), base, LIMITS)
    assert fluency_breach(Fluency(0.4, 0.5, 0.8), base, LIMITS) is None
    assert fluency_breach(Fluency(0.4, 0.5, 0.8), base, LIMITS.halved())


def test_undone_steps_damp_and_eight_in_a_row_stop() -> None:
    state = GuardState()
    for _ in range(7):
        assert state.undo(5, LIMITS, damp=True) == "undo and damp"
    state.kept(0.0, 1.0)
    assert state.undo(5, LIMITS, damp=True) == "undo and damp"
    assert state.scale == pytest.approx(1e-8)
    for _ in range(6):
        state.undo(5, LIMITS, damp=True)
    assert state.may_unlearn(5)
    assert state.undo(5, LIMITS, damp=True) == "stop"
    assert not state.may_unlearn(10**9)


def test_a_full_burst_rests_until_the_next_learning_step() -> None:
    state = GuardState()
    assert state.undo(5, LIMITS, damp=False) == "undo and rest"
    assert state.scale == 1.0
    assert not state.may_unlearn(5)
    assert state.may_unlearn(6)


def test_pauses_end_and_the_fourth_stops() -> None:
    state = GuardState()
    for pause in range(3):
        step = 100 * pause
        assert state.pause(step, LIMITS) == "pause"
        assert state.is_wary
        assert not state.may_unlearn(step + 15)
        assert state.may_unlearn(step + 16)
    assert state.pause(300, LIMITS) == "stop"


def test_the_state_survives_as_primitives() -> None:
    state = GuardState(base_fluency=Fluency(0.1, 0.2, 0.3))
    state.watched.breach("loss", 2.0, 0.25)
    state.kept(0.5, 3.0)
    state.pause(7, LIMITS)
    state.records.append({"step": 7, "action": "pause"})
    values = json.loads(json.dumps(state.as_primitives()))
    assert GuardState.from_primitives(values) == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rise": 0.0}, "AscentGuard.max_rise must be above 0, got 0"),
        ({"damping": 1.0}, r"AscentGuard.damping must be in \(0, 1\)"),
        ({"max_spike": 1.0}, "AscentGuard.max_spike must be above 1"),
        ({"pause_steps": 0}, "AscentGuard.pause_steps must be at least 1"),
    ],
)
def test_bad_limits_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardLimits(**options)
