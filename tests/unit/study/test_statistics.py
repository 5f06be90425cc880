"""Gains, intervals and shares against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lwf_lightning.study.statistics import adjusted_p_values, gain_over, stratified_interval

BASELINE = {0: 0.50, 1: 0.62, 2: 0.55, 3: 0.58}
METHOD = {0: 0.61, 1: 0.63, 2: 0.66, 3: 0.60, 9: 0.99}
CEILING = {0: 0.90, 1: 0.95, 2: 0.85, 3: 0.92}


def test_gain_is_paired_by_common_seeds() -> None:
    gain = gain_over(METHOD, BASELINE)
    assert gain is not None
    differences = np.array([0.11, 0.01, 0.11, 0.02])
    assert gain.seeds == 4
    assert gain.gain == pytest.approx(differences.mean())
    half = stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2
    assert (gain.low, gain.high) == pytest.approx((gain.gain - half, gain.gain + half))
    paired = stats.ttest_rel([METHOD[s] for s in BASELINE], list(BASELINE.values()))
    assert gain.p_value == pytest.approx(paired.pvalue)
    assert gain.recovered is None


def test_recovered_share_is_the_ratio_of_means_with_fiellers_interval() -> None:
    """Its ends are where a t-test of gain minus share times gap begins to reject."""
    gain = gain_over(METHOD, BASELINE, CEILING)
    assert gain is not None
    won = np.array([METHOD[s] - BASELINE[s] for s in BASELINE])
    gap = np.array([CEILING[s] - BASELINE[s] for s in BASELINE])
    assert gain.recovered == pytest.approx(won.sum() / gap.sum())
    shares = np.linspace(-0.5, 1.0, 150_001)
    held = shares[stats.ttest_1samp(won[:, None] - shares * gap[:, None], 0.0).pvalue >= 0.05]
    assert gain.recovered_low == pytest.approx(held.min(), abs=2e-5)
    assert gain.recovered_high == pytest.approx(held.max(), abs=2e-5)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_interval_of_a_share_holds_it_and_agrees_with_that_of_the_gain(
    seeds: int, share: float
) -> None:
    source = np.random.default_rng(0)
    held = shown = 0
    for _ in range(400):
        gaps = dict(enumerate(source.normal(10, 0.3 if seeds == 2 else 1.0, seeds)))
        gains = dict(enumerate(source.normal(10 * share, 2.0, seeds)))
        gain = gain_over(gains, dict.fromkeys(gaps, 0.0), gaps)
        assert gain is not None
        if math.isnan(gain.recovered_low):
            continue
        shown += 1
        held += gain.recovered_low <= share <= gain.recovered_high
        assert (gain.recovered_low > 0) == (gain.low > 0)
        assert (gain.recovered_high < 0) == (gain.high < 0)
    assert shown > 350
    assert 0.92 <= held / shown <= 0.98


def test_one_seed_and_no_spread_have_no_interval() -> None:
    one = gain_over({0: 0.7}, {0: 0.5}, {0: 0.9})
    assert one is not None
    assert math.isnan(one.low)
    assert one.recovered == pytest.approx(0.5)
    same = gain_over({0: 0.75, 1: 0.75}, {0: 0.5, 1: 0.5})
    assert same is not None
    assert math.isnan(same.low)  # two that meet by chance are no certainty
    assert math.isnan(same.high)
    none = gain_over({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.7})
    assert none is not None
    assert (none.low, none.high) == (0.0, 0.0)
    assert gain_over({0: 1.0}, {1: 1.0}) is None


def test_equal_gains_up_to_rounding_have_no_spread() -> None:
    gain = gain_over({0: 0.6, 1: 0.8}, {0: 0.5, 1: 0.7}, {0: 0.7, 1: 0.9})
    assert gain is not None
    assert math.isnan(gain.low)
    assert math.isnan(gain.p_value)
    assert math.isnan(gain.recovered_low)


@pytest.mark.parametrize(
    "gaps", [[-0.1, 0.3, -0.1, 0.3], [-0.1, 0.1, 0.2], [0.0, 0.4], [-0.4, -0.5, -0.4], [-0.1]]
)
def test_a_gap_that_may_be_none_or_is_negative_gives_no_share(gaps: list[float]) -> None:
    zero = dict.fromkeys(range(len(gaps)), 0.0)
    gain = gain_over({s: 0.05 + 0.01 * s for s in zero}, zero, dict(enumerate(gaps)))
    assert gain is not None
    assert gain.recovered is not None
    assert all(math.isnan(v) for v in (gain.recovered, gain.recovered_low, gain.recovered_high))


def test_a_method_that_is_the_ceiling_wins_all_of_the_gap() -> None:
    gaps = {0: 0.21, 1: 0.33, 2: 0.37}
    zero = dict.fromkeys(gaps, 0.0)
    for method, share in ((gaps, 1.0), ({s: -gap for s, gap in gaps.items()}, -1.0)):
        gain = gain_over(method, zero, gaps)
        assert gain is not None
        found = (gain.recovered, gain.recovered_low, gain.recovered_high)
        assert found == pytest.approx((share, share, share))


def test_adjustment_is_that_of_benjamini_and_hochberg() -> None:
    p = [0.001, 0.02, 0.03, 0.5]
    ranked = [p[i] * len(p) / (i + 1) for i in range(len(p))]
    expected = [min(ranked[i:]) for i in range(len(p))]
    assert adjusted_p_values(p) == pytest.approx(expected)
    assert math.isnan(adjusted_p_values([float("nan")])[0])


def test_the_mean_of_groups_has_welchs_interval() -> None:
    """Of two groups as scipy has it: the sum is the difference to the negative of the other."""
    first, second = np.array([0.11, 0.14, 0.12, 0.10]), np.array([-0.09, -0.06, -0.08])
    welch = stats.ttest_ind(first, -second, equal_var=False)
    low, high = welch.confidence_interval(0.95)
    found = stratified_interval([first, second])
    assert found == pytest.approx((low / 2, high / 2, welch.pvalue))
    one = stratified_interval([first])
    assert one == pytest.approx((*stats.t.interval(0.95, 3, first.mean(), stats.sem(first)),
                                 stats.ttest_1samp(first, 0).pvalue))  # fmt: skip


def test_groups_without_spread_or_with_one_value() -> None:
    low, high, p_value = stratified_interval([np.full(2, 0.1), np.full(3, 0.3)])
    assert all(math.isnan(value) for value in (low, high, p_value))
    assert stratified_interval([np.zeros(2), np.zeros(3)])[:2] == (0.0, 0.0)
    for groups in ([np.array([0.1, 0.2]), np.array([0.1])], []):
        assert all(math.isnan(value) for value in stratified_interval(groups))


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_groups_hold_their_mean_however_far_they_are_apart(seeds: int) -> None:
    source = np.random.default_rng(0)
    means, draws = np.array([12.0, -8.0, 3.0, 0.5]), 400
    held = 0
    for _ in range(draws):
        low, high, _ = stratified_interval([*source.normal(means[:, None], 1.0, (4, seeds))])
        held += low <= means.mean() <= high
    assert 0.92 <= held / draws <= 0.98
