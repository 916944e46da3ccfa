"""Rival 95 % intervals over replicates, which a calibration study compares.

Reports use `student`, by `steerlora.evaluation.statistics.t_interval`. Shapes: N studies, S
replicates, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import special

from steerlora.evaluation.statistics import CONFIDENCE, ratio_estimate, t_quantile

RESAMPLES = 1000
TAIL = (1 - CONFIDENCE) / 2


class Samples(NamedTuple):
    """The replicates of N studies of one effect, ``mean(numerator) / mean(denominator)``."""

    numerator: np.ndarray
    """[N, S]."""
    denominator: np.ndarray
    """[N, S]; ones where the effect is a mean."""
    item_errors: np.ndarray
    """[N, S] standard errors of each replicate's effect that come from its items."""


class Bounds(NamedTuple):
    """Ends of an interval, each [N]; NaN: none can be given."""

    low: np.ndarray
    high: np.ndarray


def student(samples: Samples) -> Bounds:
    """Student's t with S - 1 degrees of freedom, a ratio linearised."""
    value, error = ratio_estimate(samples.numerator, samples.denominator)
    return _around(value, t_quantile(samples.numerator.shape[1]) * error)


def student_and_items(samples: Samples) -> Bounds:
    """Student's t, its half-width and that of the items' normal interval added in squares."""
    value, error = ratio_estimate(samples.numerator, samples.denominator)
    across = t_quantile(samples.numerator.shape[1]) * error
    return _around(value, np.hypot(across, -special.ndtri(TAIL) * _item_error(samples)))


def percentile(samples: Samples) -> Bounds:
    """Percentiles of the bootstrap over replicates (Efron & Tibshirani 1993, chapter 13)."""
    return _percentiles(_resampled(samples))


def percentile_and_items(samples: Samples) -> Bounds:
    """The same, with normal noise of the items' error in every resample."""
    noise = np.random.default_rng(1).standard_normal(RESAMPLES)
    return _percentiles(_resampled(samples) + _item_error(samples)[:, None] * noise)


def corrected_bootstrap(samples: Samples) -> Bounds:
    """The bootstrap's standard error times ``sqrt(S / (S - 1))``, and quantiles of t.

    Resamples of S values vary by (S - 1)/S of what means of S values do.
    """
    count = samples.numerator.shape[1]
    value, _ = ratio_estimate(samples.numerator, samples.denominator)
    error = _resampled(samples).std(axis=1) * np.sqrt(count / (count - 1))
    return _around(value, t_quantile(count) * error)


def sign_flips(samples: Samples) -> Bounds:
    """Every theta that the two-sided sign-flip test of ``T - theta B`` does not reject at 0.05.

    They lie between the k-th least and the k-th largest of the ratios over all 2^S - 1 subsets of
    the replicates, where ``k = floor(0.025 2^S)`` (Hartigan 1969, "typical values"). Below six
    replicates no theta is rejected, and there is no interval. B must be positive in each replicate.
    """
    count = samples.numerator.shape[1]
    place = int(TAIL * 2**count)
    if place < 1:
        return Bounds(*np.full((2, len(samples.numerator)), np.nan))
    subsets = np.array(list(product((0.0, 1.0), repeat=count)))[1:].T  # [S, 2^S - 1]
    below = np.where(samples.denominator > 0, samples.denominator, np.nan)
    ratios = np.sort(samples.numerator @ subsets / (below @ subsets), axis=1)
    return Bounds(ratios[:, place - 1], ratios[:, -place])


Method = Callable[[Samples], Bounds]
METHODS: dict[str, Method] = {
    "percentile bootstrap": percentile,
    "percentile bootstrap and items": percentile_and_items,
    "corrected bootstrap": corrected_bootstrap,
    "Student's t": student,
    "Student's t and items": student_and_items,
    "sign flips": sign_flips,
}
"""By the names that a calibration study shows them under."""


def _around(value: np.ndarray, half: np.ndarray) -> Bounds:
    return Bounds(value - half, value + half)


def _item_error(samples: Samples) -> np.ndarray:
    """[N] error of the mean from items, which replicates share: it does not average out."""
    return np.sqrt((samples.item_errors**2).mean(axis=1))


def _resampled(samples: Samples) -> np.ndarray:
    """[N, B] the effect in resamples of the replicates; NaN where its denominator vanishes."""
    weights = _weights(samples.numerator.shape[1])
    below = samples.denominator @ weights
    return samples.numerator @ weights / np.where(below > 0, below, np.nan)


def _percentiles(resampled: np.ndarray) -> Bounds:
    return Bounds(*np.quantile(resampled, (TAIL, 1 - TAIL), axis=1))


@cache
def _weights(count: int) -> np.ndarray:
    """[S, B] how often each replicate was drawn, over S."""
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, RESAMPLES)
    return drawn.T / count
