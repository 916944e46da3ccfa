"""How sure we are: standard errors, paired bootstraps, tests.

Shapes: S seeds, I items, O orders, B bootstrap replicates.

Two kinds of data come in. *Item scores* [S, I]: one score an item, the same items under both
conditions and under every seed; items and seeds are resampled, always together for the two
conditions, hence "paired" (Efron & Tibshirani 1993, ch. 8 and 13). *Summaries* [O, S]: only a
value and its standard error a run; orders and seeds are resampled, and item noise is drawn from a
normal distribution, once for all runs of a condition, because they share their items. Intervals
are percentile intervals. Few seeds make them too narrow (the variance over S seeds comes out
(S - 1)/S of what it should be), so an interval says how many it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

REPLICATES = 2000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval, and what it rests on. NaN bounds: cannot be told."""

    value: float
    low: float
    high: float
    seeds: int
    items: int

    @property
    def known(self) -> bool:
        """Whether value and bounds are all finite."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())


class Paired(NamedTuple):
    """Item scores of one task or domain under two conditions, each [S, I], item by item."""

    baseline: np.ndarray
    treatment: np.ndarray


class Runs(NamedTuple):
    """A value of every run and its standard error from items, each [O, S]; NaN: no such run."""

    values: np.ndarray
    stderr: np.ndarray


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean, ``std(ddof=1) / sqrt(n)``; 0 below two values.

    One value tells nothing about its spread. That is 0 here and not NaN, because a score of one
    item must be stored (JSON has no NaN) and because one seed leaves the error of its items as it
    is (`combined_error`). A table that must show it as unknown looks at how many values there are.
    """
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def combined_error(values: Sequence[float], stderr: Sequence[float]) -> float:
    """Standard error of a mean over seeds that were all scored on the same items.

    ``sqrt(sem(values)^2 + mean(stderr)^2)``: items are shared, so their error does not average
    out over seeds. It counts twice what items and seeds have in common, which is the careful
    side. With one seed it is the item error.
    """
    return float(np.hypot(standard_error(values), np.mean(stderr)))


def paired_difference(strata: Sequence[Paired], *, seed: int = 0) -> Interval:
    """``treatment - baseline``: mean over items and seeds, then over strata (tasks or domains).

    Args:
        strata: at least one; the same S in all, its own items in each.
        seed: of the bootstrap; equal seeds resample alike.
    """
    return _interval(strata, seed, _difference)


def paired_drop(strata: Sequence[Paired], *, seed: int = 0) -> Interval:
    """Percentage drop ``100 (1 - treatment / baseline)``, a ratio of means over strata.

    Bounds are NaN unless the baseline is positive in every replicate: a percentage of nothing, or
    of a negative score, says nothing.
    """
    return _interval(strata, seed, _percent_drop)


def paired_drop_difference(first: Sequence[Sequence[Paired]], second: Sequence[Paired]) -> Interval:
    """Mean drop over the treatments ``first`` less the drop of ``second``, in percentage points.

    All share one baseline and are resampled together, so what they have in common cancels.
    """
    drops = (_bootstrap(strata, 0, _percent_drop) for strata in [*first, second])
    points, replicates = zip(*drops, strict=True)
    difference = np.mean(replicates[:-1], axis=0) - replicates[-1]
    value = float(np.mean(points[:-1]) - points[-1])
    return Interval(value, *_bounds(difference), *_sizes(second))


def summary_difference(baseline: Runs, treatment: Runs, items: int) -> Interval:
    """``treatment - baseline`` of means over runs, where only summaries are known."""
    return _summary_interval(baseline, treatment, items, _difference)


def summary_reduction(baseline: Runs, treatment: Runs, items: int) -> Interval:
    """Percentage reduction ``100 (1 - treatment / baseline)`` of means over orders and seeds.

    As for positive forgetting of one method against another. Only runs (order, seed) that both
    methods have count. Bounds are NaN unless the baseline is positive in every replicate.
    """
    return _summary_interval(baseline, treatment, items, _percent_drop)


def summary_ratio(baseline: Runs, treatment: Runs, items: int) -> Interval:
    """``treatment / baseline``, under the conditions of `summary_reduction`."""
    return _summary_interval(baseline, treatment, items, lambda b, t: 1 - _percent_drop(b, t) / 100)


def summary_mean(runs: Runs, items: int) -> Interval:
    """Mean over orders and seeds, with the interval that resampling them and the items gives."""
    return _summary_interval(runs, runs, items, lambda _, t: t)


def run_difference(baseline: ArrayLike, treatment: ArrayLike) -> Interval:
    """Mean paired difference over runs, bootstrapped over runs alone; NaN bounds below two.

    For numbers over so many tokens that only the run matters, such as routing health.
    """
    difference = np.asarray(treatment, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    count = len(difference)
    bounds = _bounds(_resampling(count, 0) @ difference) if count > 1 else (math.nan, math.nan)
    return Interval(float(difference.mean()), *bounds, count, 0)


def effect_size(baseline: ArrayLike, treatment: ArrayLike) -> float:
    """Cohen's ``d_z = mean(x) / std(x, ddof=1)`` of the paired differences x; NaN below two pairs.

    How far the treatment shifts an item, in units of how much that shift differs between items.
    NaN also where all differences are equal.

    Source: Cohen 1988, Statistical Power Analysis, 2nd ed., p. 48; Lakens 2013 calls it d_z.

    Args:
        baseline, treatment: [n] values, paired; of several seeds, the means over them.
    """
    difference = np.asarray(treatment, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    # Equal differences of floats differ by rounding alone, which is no spread.
    if spread <= 1e-12 * max(1.0, float(np.abs(difference).max(initial=0.0))):
        return float("nan")
    return float(difference.mean() / spread)


def paired_test(baseline: ArrayLike, treatment: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value of a paired sign-flip test of the mean difference; NaN below two pairs.

    Under the null a difference is as likely negative as positive. Up to 10 pairs every sign
    pattern is counted, and the p-value is exact (at least 2 / 2^n); beyond, 1999 random ones are,
    and it is at least 0.001. Pairs count as independent: where runs share a seed or an order, the
    p-value is on the small side.

    Source: Fisher 1935, The Design of Experiments, section 21; by ``scipy.stats``.

    Args:
        baseline, treatment: [n] values, paired; such as items, or runs.
    """
    difference = np.asarray(treatment, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if len(difference) < 2:
        return float("nan")
    if 2 ** len(difference) < REPLICATES:
        exact = stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=REPLICATES
        )
        return float(exact.pvalue)
    generator = np.random.default_rng(seed)

    def flipped(size: tuple[int, ...]) -> np.ndarray:
        return generator.choice((-1.0, 1.0), size=size) * difference

    test = stats.monte_carlo_test(
        difference, flipped, np.mean, vectorized=True, n_resamples=REPLICATES - 1
    )
    return float(test.pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values adjusted for their number by Holm's step-down method (Holm 1979).

    ``p~_(i) = max_{j<=i} min(1, (m - j + 1) p_(j))`` over the sorted values; same order out as in.
    NaN, a test that could not be made, stays NaN and does not count.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    order = np.argsort(adjusted)[: np.count_nonzero(~np.isnan(adjusted))]  # NaN is sorted last
    stepped = adjusted[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted


Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(mean baseline, mean treatment), scalars or [B], to the statistic of the same shape."""


def _difference(baseline: np.ndarray, treatment: np.ndarray) -> np.ndarray:
    return treatment - baseline


def _percent_drop(baseline: np.ndarray, treatment: np.ndarray) -> np.ndarray:
    return 100 * (1 - treatment / np.where(baseline > 0, baseline, np.nan))


def _interval(strata: Sequence[Paired], seed: int, statistic: Statistic) -> Interval:
    point, replicates = _bootstrap(strata, seed, statistic)
    return Interval(point, *_bounds(replicates), *_sizes(strata))


def _bootstrap(
    strata: Sequence[Paired], seed: int, statistic: Statistic
) -> tuple[float, np.ndarray]:
    """The statistic of the data and of B resamples of its seeds and, in each stratum, items."""
    count = len(strata[0].baseline)
    for stratum in strata:
        if stratum.baseline.shape != stratum.treatment.shape or len(stratum.baseline) != count:
            raise ValueError(
                "paired scores need the same seeds and items on both sides; got "
                f"{stratum.baseline.shape} and {stratum.treatment.shape}, {count} seeds"
            )
    seeds = _resampling(count, seed)
    means = np.zeros((2, REPLICATES))
    for index, stratum in enumerate(strata):
        items = _resampling(stratum.baseline.shape[1], (seed, index + 1))
        for side, scores in enumerate(stratum):
            means[side] += ((items @ scores.T) * seeds).sum(axis=1) / len(strata)
    points = [np.mean([np.mean(stratum[side]) for stratum in strata]) for side in (0, 1)]
    return float(statistic(*points)), statistic(*means)


def _summary_interval(
    baseline: Runs, treatment: Runs, items: int, statistic: Statistic
) -> Interval:
    """Resample orders and seeds; a condition's item noise is drawn afresh in every replicate."""
    shared = np.isfinite(baseline.values) & np.isfinite(treatment.values)
    orders, seeds = shared.shape
    if not shared.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0, items)
    weights = _resampling(orders, (0, 0))[:, :, None] * _resampling(seeds, (0, 1))[:, None, :]
    weights = weights * shared
    totals = weights.sum(axis=(1, 2))
    weights = weights[totals > 0] / totals[totals > 0, None, None]
    generator = np.random.default_rng(0)
    means, points = [], []
    for runs in (baseline, treatment):
        values, stderr = np.where(shared, runs.values, 0.0), np.where(shared, runs.stderr, 0.0)
        noise = generator.standard_normal((len(weights), 1, 1)) * stderr
        means.append((weights * (values + noise)).sum(axis=(1, 2)))
        points.append(values[shared].mean())
    seed_count = int(shared.any(axis=0).sum())
    return Interval(float(statistic(*points)), *_bounds(statistic(*means)), seed_count, items)


@lru_cache(maxsize=16)
def _resampling(count: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """[B, count] weights of a bootstrap: how often each unit was drawn, over ``count``."""
    draws = np.random.default_rng(seed).integers(0, count, (REPLICATES, count))
    flat = draws + count * np.arange(REPLICATES)[:, None]
    weights = np.bincount(flat.ravel(), minlength=REPLICATES * count) / count
    weights = weights.reshape(REPLICATES, count)
    weights.flags.writeable = False  # shared by every caller
    return weights


def _bounds(replicates: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)


def _sizes(strata: Sequence[Paired]) -> tuple[int, int]:
    return len(strata[0].baseline), sum(stratum.baseline.shape[1] for stratum in strata)
