"""Gains, intervals and shares against brute force."""

from __future__ import annotations

import itertools
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


def test_recovered_share_is_the_ratio_of_means_with_a_bootstrap_over_seeds() -> None:
    gain = gain_over(METHOD, BASELINE, CEILING)
    assert gain is not None
    won = np.array([METHOD[s] - BASELINE[s] for s in BASELINE])
    gap = np.array([CEILING[s] - BASELINE[s] for s in BASELINE])
    assert gain.recovered == pytest.approx(won.sum() / gap.sum())
    every = [won[list(i)].sum() / gap[list(i)].sum() for i in itertools.product(range(4), repeat=4)]
    assert gain.recovered_low == pytest.approx(np.quantile(every, 0.025), abs=0.01)
    assert gain.recovered_high == pytest.approx(np.quantile(every, 0.975), abs=0.01)


def test_one_seed_and_no_spread_have_no_interval() -> None:
    one = gain_over({0: 0.7}, {0: 0.5}, {0: 0.9})
    assert one is not None
    assert math.isnan(one.low)
    assert one.recovered == pytest.approx(0.5)
    same = gain_over({0: 0.75, 1: 0.75}, {0: 0.5, 1: 0.5})
    assert same is not None
    assert (same.low, same.high) == (0.25, 0.25)
    assert gain_over({0: 1.0}, {1: 1.0}) is None


def test_equal_gains_up_to_rounding_have_no_spread() -> None:
    gain = gain_over({0: 0.6, 1: 0.8}, {0: 0.5, 1: 0.7}, {0: 0.7, 1: 0.9})
    assert gain is not None
    assert (gain.low, gain.high) == pytest.approx((0.1, 0.1))
    assert math.isnan(gain.p_value)
    assert math.isnan(gain.recovered_low)


@pytest.mark.parametrize("gaps", [[-0.1, 0.3, -0.1, 0.3], [-0.1, 0.1, 0.2], [0.0, 0.4]])
def test_a_gap_that_may_be_none_gives_a_share_without_interval(gaps: list[float]) -> None:
    zero = dict.fromkeys(range(len(gaps)), 0.0)
    gain = gain_over({s: 0.05 + 0.01 * s for s in zero}, zero, dict(enumerate(gaps)))
    assert gain is not None
    assert gain.recovered == pytest.approx(gain.gain / np.mean(gaps))
    assert math.isnan(gain.recovered_low)
    assert math.isnan(gain.recovered_high)


def test_a_rare_resample_without_a_gap_keeps_the_interval_finite() -> None:
    gaps = {0: 0.0, 1: 0.3, 2: 0.3, 3: 0.3, 4: 0.3}  # one resample of 3125 has no gap at all
    zero = dict.fromkeys(gaps, 0.0)
    for method, share in ((gaps, 1.0), ({s: -gap for s, gap in gaps.items()}, -1.0)):
        gain = gain_over(method, zero, gaps)
        assert gain is not None
        assert (gain.recovered_low, gain.recovered_high) == pytest.approx((share, share))


def test_no_gap_no_share() -> None:
    gain = gain_over({0: 0.7}, {0: 0.5}, {0: 0.4})
    assert gain is not None
    assert gain.recovered is None


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
    assert (low, high) == pytest.approx((0.2, 0.2))
    assert math.isnan(p_value)
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
