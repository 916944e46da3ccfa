"""Shares of a gap: their value, their interval, and when there is too little to share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steerlora.evaluation.splicing import share_closed


def rows(seed: int, count: int = 200, gap: float = 1.0, closed: float = 0.4):
    random = np.random.default_rng(seed)
    base = random.normal(40, 10, count)  # rows differ far more than the ways to run the model
    each = gap * random.gamma(2.0, 0.5, count)
    return base, base + each, base + each * (1 - closed) + random.normal(0, 0.1, count)


def test_a_share_is_of_the_sums_over_rows():
    share = share_closed([1.0, 2.0], [2.0, 5.0], [1.5, 3.5])
    assert share.value == pytest.approx((0.5 + 1.5) / (1 + 3))
    assert share.gap == pytest.approx(2.0)
    assert share.gap_errors == pytest.approx(2.0 / (np.std([1, 3], ddof=1) / math.sqrt(2)))


def test_the_interval_resamples_numerator_and_denominator_together():
    """By a loop over draws; and far narrower than of either alone, since they go together."""
    base, spliced, method = rows(0)
    share = share_closed(base, spliced, method, draws=500, seed=3)
    chosen = np.random.default_rng(3).integers(0, 200, (500, 200))
    ratios = []
    for draw in chosen:
        gap = sum(spliced[i] - base[i] for i in draw)
        ratios.append(sum(spliced[i] - method[i] for i in draw) / gap)
    assert (share.low, share.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))
    assert share.low < 0.4 < share.high
    assert share.high - share.low < 0.06


def test_it_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(200):
        share = share_closed(*rows(seed, count=60), draws=400)
        held += share.low <= 0.4 <= share.high
    assert 0.9 <= held / 200 <= 0.99


@pytest.mark.parametrize("gap", [0.0, 0.001, 1.0])
def test_too_small_a_gap_means_nothing(gap):
    base, spliced, method = rows(1, gap=gap)
    if 0 < gap < 1:  # within the noise of rows
        spliced = spliced + np.random.default_rng(2).normal(0, 0.1, len(base))
    assert share_closed(base, spliced, method).means_something == (gap == 1.0)
