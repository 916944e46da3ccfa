from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steerlora.evaluation.statistics import Interval, t_interval
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    LEAST_AGAIN,
    LEAST_SHARE,
    NOT_MEASURED,
    NOT_REPRODUCED,
    PARTLY,
    UNDECIDED,
    again,
    judge,
    overlaps,
    verdict,
)

NAN = float("nan")


def interval(low, high, seeds=4):
    return Interval((low + high) / 2, low, high, seeds, 200)


SURE, TINY = interval(0.01, 0.03), interval(0.001, 0.01)
WIDE, SMALL, BELOW = interval(-0.01, 0.03), interval(-0.01, 0.01), interval(-0.03, -0.01)


@pytest.mark.parametrize(
    ("effects", "agrees", "expected"),
    [
        ([SURE], True, IN_RANGE),
        ([SURE], False, DIRECTION),
        ([interval(0.002, 0.03)], False, DIRECTION),
        ([TINY], True, NOT_REPRODUCED),  # above zero, and too small to count
        ([interval(0.001, 0.03)], True, UNDECIDED),  # may be too small to count
        ([WIDE], True, UNDECIDED),  # nothing is shown, and nothing refuted
        ([BELOW], True, NOT_REPRODUCED),
        ([SMALL], True, NOT_REPRODUCED),  # zero may be, what the paper says may not
        ([interval(0.0, 0.01)], True, NOT_REPRODUCED),
        ([interval(-0.01, 0.016)], True, UNDECIDED),
        ([SURE, WIDE], True, UNDECIDED),  # all must
        ([SURE, WIDE, SMALL], True, NOT_REPRODUCED),  # one is enough
        ([], True, NOT_MEASURED),
        ([SURE, Interval(NAN, NAN, NAN, 3, 0)], True, NOT_MEASURED),
        ([Interval(0.5, NAN, NAN, 1, 0)], True, UNDECIDED),
        ([Interval(0.5, NAN, NAN, 1, 0), SMALL], True, NOT_REPRODUCED),
        ([Interval(0.5, NAN, NAN, 1, 0), SURE], True, UNDECIDED),
        ([interval(0.02, 0.02)], True, UNDECIDED),  # replicates cannot be so sure
        ([interval(-0.02, -0.02)], True, UNDECIDED),
        ([interval(0.0, 0.0)], True, NOT_REPRODUCED),  # nothing changed in any of them
    ],
)
def test_verdict_rule(effects, agrees, expected):
    assert verdict(effects, smallest=0.016, agrees=agrees) == expected


def test_a_claim_without_a_size_is_refuted_only_on_the_wrong_side():
    assert verdict([SMALL], smallest=0.0, agrees=True) == UNDECIDED
    assert verdict([BELOW], smallest=0.0, agrees=True) == NOT_REPRODUCED


def slow_again(effects, smallest, studies=20000):
    """The same probability with every replicate of every new study drawn, one effect at a time."""
    generator = np.random.default_rng(1)
    above, refuted = np.ones(studies, bool), np.zeros(studies, bool)
    for effect in effects:
        count = effect.seeds
        s = (effect.high - effect.low) / 2 / stats.t.ppf(0.975, count - 1) * np.sqrt(count)
        for study in range(studies):
            sigma = np.sqrt((count - 1) * s**2 / stats.chi2.rvs(count - 1, random_state=generator))
            mu = generator.normal(effect.value, sigma / np.sqrt(count))
            new = t_interval(generator.normal(mu, sigma, count))
            above[study] &= new.low > LEAST_SHARE * smallest
            refuted[study] |= new.low <= LEAST_SHARE * smallest and new.high < smallest
    first = all(effect.low > LEAST_SHARE * smallest for effect in effects)
    return np.mean(above if first else refuted)


@pytest.mark.parametrize(
    "effects",
    [
        [interval(0.01, 0.03, 4)],
        [interval(0.002, 0.03, 3)],
        [interval(0.005, 0.03, 5), interval(0.02, 0.04, 3)],
        [interval(-0.02, 0.01, 4)],
        [interval(-0.02, 0.012, 6), interval(-0.01, 0.05, 4)],
    ],
)
def test_again_is_what_new_studies_give(effects):
    expected = slow_again(effects, 0.016, studies=4000)
    assert again(effects, smallest=0.016) == pytest.approx(expected, abs=0.03)


def test_again_of_what_barely_decides_is_about_a_half():
    # The new mean misses by sqrt(2) standard errors, and the bound is as likely passed as not.
    barely = interval(LEAST_SHARE * 0.5 + 1e-9, 1.0, 30)
    assert again([barely], smallest=0.5) == pytest.approx(0.5, abs=0.03)
    assert again([interval(10, 11, 30)], smallest=0.5) == 1.0
    assert again([interval(0.0, 0.0)], smallest=0.5) == 1.0


def test_only_a_verdict_that_comes_again_stands():
    sure = judge([interval(0.02, 0.03, 5)], smallest=0.016, agrees=True)
    assert (sure.verdict, sure.by_intervals, sure.replicates) == (IN_RANGE, IN_RANGE, 5)
    assert sure.again >= LEAST_AGAIN
    close = judge([interval(0.0025, 0.03, 5)], smallest=0.016, agrees=False)
    assert (close.verdict, close.by_intervals) == (UNDECIDED, DIRECTION)
    assert 0.3 < close.again < LEAST_AGAIN
    open_ = judge([WIDE, interval(0.02, 0.03, 3)], smallest=0.016, agrees=True)
    assert (open_.verdict, open_.by_intervals, open_.replicates) == (UNDECIDED, UNDECIDED, 3)
    assert np.isnan(open_.again)
    assert judge([], smallest=0.016, agrees=True).verdict == NOT_MEASURED


@pytest.mark.parametrize("effect", [SURE, TINY, WIDE, BELOW])
def test_what_is_not_whole_has_no_verdict_whatever_it_says(effect):
    judged = judge([effect], smallest=0.016, agrees=True, whole=False)
    assert judged.verdict == PARTLY
    assert judge([], smallest=0.016, agrees=True, whole=False).verdict == NOT_MEASURED


def test_a_model_of_one_replicate_never_decides_again():
    """It neither keeps another from refuting the claim nor lets the others show it."""
    effects = [Interval(0.5, NAN, NAN, 1, 0), interval(-0.001, 0.001, 5)]
    judged = judge(effects, smallest=0.016, agrees=True)
    assert (judged.verdict, judged.replicates) == (NOT_REPRODUCED, 1)
    assert judged.again > LEAST_AGAIN


def test_overlaps():
    assert overlaps(interval(0.0, 0.02), 0.016, 0.052)
    assert overlaps(interval(12.0, 14.0), 13.1, 13.1)
    assert not overlaps(interval(0.06, 0.08), 0.016, 0.052)
    assert not overlaps(interval(0.0, 0.01), 0.016, 0.052)
