from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from steerlora.evaluation.statistics import (
    effect_size,
    holm,
    paired_test,
    ratio_estimate,
    replicates_error,
    standard_error,
    t_interval,
    t_quantile,
)


def test_standard_error_and_that_of_replicates():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / np.sqrt(3))
    assert standard_error([1.0]) == standard_error([]) == 0.0
    assert standard_error([0.5] * 9) == 0.0
    assert replicates_error([0.5], [0.1]) == 0.1
    assert replicates_error([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]) == pytest.approx(1 / np.sqrt(3))


@pytest.mark.parametrize("count", [2, 3, 12])
def test_interval_of_a_mean_is_students(count):
    values = np.random.default_rng(count).normal(3, 2, count)
    interval = t_interval(values, items=40)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval == (
        pytest.approx(values.mean()), pytest.approx(low), pytest.approx(high), count, 40,
    )  # fmt: skip
    assert t_quantile(count) == pytest.approx(stats.t.ppf(0.975, count - 1))


def test_one_replicate_has_a_value_and_no_interval():
    assert t_interval([0.4]).value == 0.4
    assert t_interval([0.4], [0.5]).value == 0.8
    assert not t_interval([0.4]).known
    assert not t_interval([0.4], [0.5]).known


def test_a_ratio_to_nothing_is_unknown():
    for below in ([0.0, 0.0], [-1.0, 0.5]):
        assert np.isnan(t_interval([0.3, 0.4], below)[:3]).all()
    assert t_interval([0.0, 0.0], [0.5, 0.4])[:3] == (0, 0, 0)


def jackknifed(numerator, denominator):
    """Standard error of a ratio of means by leaving each replicate out, slowly."""
    count = len(numerator)
    left = [np.delete(numerator, s).mean() / np.delete(denominator, s).mean() for s in range(count)]
    return np.sqrt((count - 1) / count * np.sum((np.array(left) - np.mean(left)) ** 2))


def fieller(numerator, denominator):
    """Fieller's interval: the theta at which a t-test of T - theta B is on the edge, by search."""

    def gap(theta):
        values = numerator - theta * denominator
        return abs(stats.ttest_1samp(values, 0).statistic) - stats.t.ppf(0.975, len(values) - 1)

    ratio = numerator.mean() / denominator.mean()
    return brentq(gap, ratio - 1, ratio - 1e-9), brentq(gap, ratio + 1e-9, ratio + 1)


def test_a_ratio_agrees_with_the_jackknife_and_with_fieller():
    generator = np.random.default_rng(4)
    below = generator.normal(0.8, 0.02, 8)
    above = 0.4 * below + generator.normal(0, 0.02, 8)
    value, error = ratio_estimate(above, below)
    assert value == pytest.approx(above.mean() / below.mean())
    assert error == pytest.approx(jackknifed(above, below), rel=0.02)
    interval = t_interval(above, below)
    assert interval[1:3] == pytest.approx(fieller(above, below), abs=0.002)
    # What both sides have in common cancels: apart, they would be ten times as uncertain.
    common = generator.normal(1, 0.3, 8)
    assert ratio_estimate(above * common, below * common)[1] < 0.03


def test_many_ratios_at_once_are_those_one_by_one():
    generator = np.random.default_rng(5)
    above, below = generator.normal(0.4, 0.1, (3, 7, 5)), generator.normal(0.8, 0.1, (3, 7, 5))
    values, errors = ratio_estimate(above, below)
    assert values.shape == errors.shape == (3, 7)
    for place in np.ndindex(3, 7):
        value, error = ratio_estimate(above[place], below[place])
        assert values[place] == pytest.approx(value)
        assert errors[place] == pytest.approx(error)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_intervals_hold_the_truth_as_often_as_they_say(count):
    """Of normal replicates, whose effects are far smaller than what they have in common."""
    generator = np.random.default_rng(count)
    common = generator.normal(0.8, 0.04, (2000, count))
    above = 0.6 * common + generator.normal(0, 0.02, (2000, count))
    covered = {"mean": 0, "ratio": 0}
    for one, other in zip(above, common, strict=True):
        mean, ratio = t_interval(one - other), t_interval(one, other)
        covered["mean"] += mean.low <= -0.4 * 0.8 <= mean.high
        covered["ratio"] += ratio.low <= 0.6 <= ratio.high
    for kind, times in covered.items():
        assert 0.93 <= times / 2000 <= 0.97, kind


def test_holm_worked_by_hand():
    # Sorted 0.01, 0.03, 0.04 -> 0.03, max(0.03, 0.06), max(0.06, 0.04).
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0
    # A test that could not be made is none of the tests that are counted.
    assert holm([np.nan, 0.01, 0.03]).tolist() == pytest.approx([np.nan, 0.02, 0.03], nan_ok=True)


def test_effect_size_worked_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1.
    assert effect_size([1, 1, 1], [2, 3, 4]) == pytest.approx(2.0)
    assert effect_size([2, 3, 4], [1, 1, 1]) == pytest.approx(-2.0)
    rng = np.random.default_rng(8)
    baseline, treatment = rng.normal(0, 1, (2, 50))
    t_value = stats.ttest_rel(treatment, baseline).statistic
    assert effect_size(baseline, treatment) == pytest.approx(t_value / np.sqrt(50))
    for same in ([1.0], [0.3, 0.3, 0.3], []):
        assert np.isnan(effect_size(np.zeros(len(same)), same))


def test_paired_test_is_a_t_test_of_differences():
    differences = np.random.default_rng(5).normal(0.3, 0.5, 6)
    expected = stats.ttest_rel(differences + 7.0, np.full(6, 7.0)).pvalue
    assert paired_test(differences) == pytest.approx(expected)
    for nothing in ([], [1.0], [0.2, 0.2, 0.2 + 1e-17], [0.0, 0.0]):
        assert np.isnan(paired_test(nothing))


def test_paired_test_rejects_a_true_null_as_often_as_it_says():
    draws = np.random.default_rng(6).normal(0, 1, (2000, 3))
    assert 0.04 <= np.mean([paired_test(draw) < 0.05 for draw in draws]) <= 0.06
