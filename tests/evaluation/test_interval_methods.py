from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steerlora.evaluation.interval_methods import METHODS, Samples, sign_flips
from steerlora.evaluation.statistics import t_interval


def drawn(seed, studies, count, *, ratio=True, items=0.01):
    """Studies of a true effect of 0.6."""
    generator = np.random.default_rng(seed)
    below = generator.normal(0.8, 0.04, (studies, count)) if ratio else np.ones((studies, count))
    above = 0.6 * below + generator.normal(0, 0.02, (studies, count))
    return Samples(above, below, np.full((studies, count), items))


def test_students_t_is_that_of_the_reports_and_items_add_in_squares():
    samples = drawn(0, 5, 4)
    low, high = METHODS["Student's t"](samples)
    wider = METHODS["Student's t and items"](samples)
    for study in range(5):
        interval = t_interval(samples.numerator[study], samples.denominator[study])
        assert (low[study], high[study]) == pytest.approx(interval[1:3])
        half = np.hypot(interval.high - interval.value, 1.959964 * 0.01)
        assert wider.high[study] == pytest.approx(interval.value + half)


def test_bootstraps_against_one_of_more_resamples():
    samples = drawn(1, 1, 5)
    above, below = samples.numerator[0], samples.denominator[0]
    generator = np.random.default_rng(7)
    picks = generator.integers(0, 5, (40000, 5))
    resampled = above[picks].mean(axis=1) / below[picks].mean(axis=1)
    value, width = above.mean() / below.mean(), np.ptp(np.quantile(resampled, (0.025, 0.975)))
    expected = {
        "percentile bootstrap": np.quantile(resampled, (0.025, 0.975)),
        "percentile bootstrap and items": np.quantile(
            resampled + 0.01 * generator.normal(size=40000), (0.025, 0.975)
        ),
        "corrected bootstrap": value
        + np.array([-1, 1]) * stats.t.ppf(0.975, 4) * resampled.std() * np.sqrt(5 / 4),
    }
    for name, bounds in expected.items():
        assert np.ravel(METHODS[name](samples)) == pytest.approx(bounds, abs=0.08 * width), name


def test_correcting_the_bootstrap_of_a_mean_gives_students_t():
    samples = drawn(2, 20, 4, ratio=False)
    one, other = (np.ptp(METHODS[name](samples), axis=0)
                  for name in ("corrected bootstrap", "Student's t"))  # fmt: skip
    assert one == pytest.approx(other, rel=0.1)


@pytest.mark.parametrize("count", [6, 8])
@pytest.mark.parametrize("ratio", [False, True])
def test_sign_flips_hold_every_theta_that_the_test_does_not_reject(count, ratio):
    samples = drawn(3, 1, count, ratio=ratio)
    (low,), (high,) = sign_flips(samples)

    def p_value(theta):
        differences = samples.numerator[0] - theta * samples.denominator[0]
        return stats.permutation_test((differences,), np.mean, permutation_type="samples").pvalue

    width = high - low
    assert all(p_value(theta) > 0.05 for theta in np.linspace(low, high, 9)[1:-1])
    assert all(p_value(theta) > 0.05 for theta in (low + 1e-6 * width, high - 1e-6 * width))
    assert all(p_value(theta) <= 0.05 for theta in (low - 1e-6 * width, high + 1e-6 * width))


def test_sign_flips_of_five_replicates_reject_nothing():
    assert np.isnan(sign_flips(drawn(4, 3, 5))).all()
    assert np.isnan(sign_flips(Samples(np.ones((1, 6)), np.zeros((1, 6)), np.ones((1, 6))))).all()


@pytest.mark.parametrize("ratio", [False, True])
def test_students_t_holds_the_truth_and_a_bootstrap_of_three_does_not(ratio):
    samples = drawn(5, 2000, 3, ratio=ratio)
    held = {}
    for name, method in METHODS.items():
        low, high = method(samples)
        held[name] = np.mean((low <= 0.6) & (high >= 0.6))
    assert 0.93 <= held["Student's t"] <= 0.97
    assert 0.93 <= held["corrected bootstrap"] <= 0.97
    assert held["percentile bootstrap"] < 0.85
    assert held["percentile bootstrap"] < held["percentile bootstrap and items"]
