from __future__ import annotations

import pytest

from lwf_lightning.forgetting.schedule import UnlearningSchedule


def counts(schedule: UnlearningSchedule, steps: int = 13) -> list[int]:
    return [schedule.steps_before(step) for step in range(steps)]


def test_periodic_unlearns_after_every_interval() -> None:
    assert counts(UnlearningSchedule("periodic", interval=4)) == [
        *(0, 0, 0, 0),
        *(1, 0, 0, 0),
        *(1, 0, 0, 0),
        1,
    ]
    assert counts(UnlearningSchedule("periodic", interval=1), 4) == [0, 1, 1, 1]


def test_ahead_unlearns_only_before_the_first_step() -> None:
    assert counts(UnlearningSchedule("ahead", ahead_steps=7), 4) == [7, 0, 0, 0]


def test_front_loaded_is_ahead_and_then_periodic() -> None:
    schedule = UnlearningSchedule("front_loaded", interval=3, ahead_steps=7)
    assert counts(schedule, 7) == [7, 0, 0, 1, 0, 0, 1]


def test_random_has_the_rate_of_its_interval_and_follows_its_seed() -> None:
    schedule = UnlearningSchedule("random", interval=5, seed=1)
    drawn = counts(schedule, 5000)
    assert 900 < sum(drawn) < 1100
    assert drawn == counts(UnlearningSchedule("random", interval=5, seed=1), 5000)
    assert drawn != counts(UnlearningSchedule("random", interval=5, seed=2), 5000)
    # a pure function of the step: asking out of order changes nothing
    assert [schedule.steps_before(step) for step in (77, 3, 77)] == [drawn[77], drawn[3], drawn[77]]


def test_never_never_does() -> None:
    schedule = UnlearningSchedule("never")
    assert sum(counts(schedule, 100)) == 0
    assert not schedule.unlearns


def test_whether_a_part_of_a_run_unlearns() -> None:
    periodic, ahead = UnlearningSchedule("periodic", interval=4), UnlearningSchedule("ahead")
    assert [periodic.unlearns_between(0, end) for end in (0, 4, 5)] == [False, False, True]
    assert not periodic.unlearns_between(5, 8)
    assert [ahead.unlearns_between(start, 9) for start in (0, 1)] == [True, False]


@pytest.mark.parametrize("interval", [0, -3])
def test_a_zero_or_negative_interval_is_refused(interval: int) -> None:
    with pytest.raises(ValueError, match=f"unlearning_interval must be at least 1, got {interval}"):
        UnlearningSchedule("periodic", interval=interval)


def test_other_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="ahead_steps must be at least 1"):
        UnlearningSchedule("ahead", ahead_steps=0)
    with pytest.raises(ValueError, match="unknown schedule 'sometimes'; choose one of periodic"):
        UnlearningSchedule("sometimes")  # type: ignore[arg-type]
