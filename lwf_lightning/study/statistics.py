"""Gains over the baseline, paired by seed, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Gain:
    """What a method adds to the baseline in one cell.

    Attributes:
        seeds: How many seeds both have.
        mean: Mean of the method's own figure.
        gain: Mean difference to the baseline, seed by seed.
        low: Lower end of the 95 % confidence interval of the gain (Student's t); NaN with one seed,
            or if the gain is the same with every seed and not 0: accuracies lie on a grid, and two
            that meet there by chance are no certainty.
        high: Upper end.
        p_value: Of the paired t-test, two-sided; NaN with one seed, or if the gain is the same with
            every seed but for rounding.
        recovered: Share of the gap between ceiling and baseline that the gain closes; None without
            a ceiling, or with a run of it that diverged. Below 0: the method made it worse. NaN
            unless the gap's own 95 % interval (Student's t) lies above 0: there may be nothing to
            have a share of. With one seed, where it is unknown, the gap itself has to.
        recovered_low: Lower end of its 95 % interval (Fieller's, of a ratio of paired means): the
            shares of the gap that the gains do not contradict. Holds 0 if the gain's does. NaN with
            one seed, or if neither gain nor gap has any spread.
        recovered_high: Upper end.
    """

    seeds: int
    mean: float
    gain: float
    low: float
    high: float
    p_value: float
    recovered: float | None = None
    recovered_low: float = float("nan")
    recovered_high: float = float("nan")


def gain_over(
    method: Mapping[int, float],
    baseline: Mapping[int, float],
    ceiling: Mapping[int, float] | None = None,
) -> Gain | None:
    """Compares a method with the baseline on the seeds that both have.

    Args:
        method: Seed -> figure, higher is better.
        baseline: The same of the baseline.
        ceiling: The same of the ceiling.

    Returns:
        None without a common seed.

    Example:
        >>> gain_over({0: 0.6, 1: 0.8}, {0: 0.5, 1: 0.6}).gain
        0.15
    """
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        return None
    own = np.array([method[seed] for seed in seeds])
    difference = own - np.array([baseline[seed] for seed in seeds])
    low, high, p_value = t_interval(difference)
    recovered: float | None = None
    share_low = share_high = float("nan")
    if ceiling is not None and (both := [seed for seed in seeds if seed in ceiling]):
        won = np.array([method[seed] - baseline[seed] for seed in both])
        gap = np.array([ceiling[seed] - baseline[seed] for seed in both])
        if not np.isnan(gap).any():  # else a run of the ceiling diverged
            recovered, share_low, share_high = _share(won, gap)
    return Gain(
        seeds=len(seeds),
        mean=float(own.mean()),
        gain=round(float(difference.mean()), 12),
        low=round(low, 12),  # as the gain, or it might lie beside its own interval
        high=round(high, 12),
        p_value=p_value,
        recovered=recovered,
        recovered_low=share_low,
        recovered_high=share_high,
    )


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Ends of the 95 % interval of a mean (Student's t) and p of the test that it is 0.

    Of equal values nothing is known but that they are 0, where they are: ends are 0 then, else NaN,
    and p is NaN. With less than two values all are NaN.
    """
    if len(values) < 2:
        return float("nan"), float("nan"), float("nan")
    if _has_no_spread(values):
        return _ends_without_spread(float(values.mean()))
    result = stats.ttest_1samp(values, 0.0)
    interval = result.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(result.pvalue)


def stratified_interval(groups: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Ends of the 95 % interval of the mean of groups' means, and p of the test that it is 0.

    The groups are given and each one's values are its sample, so that how far apart groups lie does
    not count. Student's t with the degrees of freedom of Welch and Satterthwaite.

    Args:
        groups: The values of each group; they may differ in number.

    Returns:
        Low end, high end and p. Without spread in any they are those of :func:`t_interval`; all are
        NaN with a group of less than two values, as nothing is known of its spread.
    """
    if not groups or any(len(group) < 2 for group in groups):
        return float("nan"), float("nan"), float("nan")
    mean = float(np.mean([group.mean() for group in groups]))
    if all(_has_no_spread(group) for group in groups):
        return _ends_without_spread(mean)
    squared = np.array([np.var(group, ddof=1) / len(group) for group in groups])
    error = float(np.sqrt(squared.sum())) / len(groups)
    freedom = squared.sum() ** 2 / sum(
        part**2 / (len(group) - 1) for part, group in zip(squared, groups, strict=True)
    )
    half = float(stats.t.ppf(0.975, freedom)) * error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, freedom))


def _share(won: np.ndarray, gap: np.ndarray) -> tuple[float, float, float]:
    """Ratio of the means with the ends of Fieller's interval."""
    nothing = float("nan")
    gap_low, _, _ = t_interval(gap)
    if gap.mean() <= 0 or gap_low <= 0:
        return nothing, nothing, nothing
    share = float(won.mean() / gap.mean())
    if len(gap) < 2 or (_has_no_spread(won) and _has_no_spread(gap)):
        return share, nothing, nothing
    # The shares s at which the mean of won - s gap is not clear of 0: a s² - 2 b s + c <= 0. As the
    # gap's own interval lies above 0, a does, and they are an interval.
    means = np.array([won.mean(), gap.mean()])
    allowed = stats.t.ppf(0.975, len(gap) - 1) ** 2 / len(gap)
    (c, b), (_, a) = np.outer(means, means) - allowed * np.cov(won, gap)
    half = float(np.sqrt(max(b**2 - a * c, 0.0)))  # rounding may take a 0 below
    return share, float((b - half) / a), float((b + half) / a)


def _ends_without_spread(mean: float) -> tuple[float, float, float]:
    """What is always 0 is so for sure; any other value may be the same by chance."""
    end = mean if abs(mean) < 1e-12 else float("nan")
    return end, end, float("nan")


def _has_no_spread(values: np.ndarray) -> bool:
    """Whether values differ by the rounding of float64 at most, as differences of equals do."""
    return bool(np.ptp(values) < 1e-12)


def adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjustment for many comparisons; NaN stays NaN.

    Example:
        >>> [round(p, 3) for p in adjusted_p_values([0.01, 0.04, float("nan"), 0.03])]
        [0.03, 0.04, nan, 0.04]
    """
    values = np.array(p_values, dtype=float)
    known = ~np.isnan(values)
    if known.any():
        values[known] = stats.false_discovery_control(values[known])
    return [float(value) for value in values]
