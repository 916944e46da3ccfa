"""What units stand for, on activity that is made so: against sums that are written out."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from steerlora.evaluation.units import (
    Activity,
    SwitchedOff,
    information,
    load,
    matched_units,
    mutual_information,
    overlap,
    own_units,
)

ROWS, TOKENS, DOMAINS = 40, 50, 2


@pytest.fixture
def activity() -> Activity:
    """Unit 0 acts on domain 0 alone, unit 1 on half of all tokens, unit 2 never."""
    domain = np.arange(ROWS) % DOMAINS
    draws = np.random.default_rng(0)
    half = draws.binomial(TOKENS, 0.5, ROWS)
    fired = np.stack([TOKENS * (domain == 0), half, np.zeros(ROWS, dtype=int)], 1)
    return Activity(fired, np.full(ROWS, TOKENS), domain)


def slow_information(activity: Activity, unit: int) -> float:
    """From a table of single tokens."""
    table: dict[tuple[bool, int], int] = dict.fromkeys(product((True, False), range(DOMAINS)), 0)
    for fired, tokens, domain in zip(activity.fired[:, unit], *activity[1:], strict=True):
        table[True, int(domain)] += int(fired)
        table[False, int(domain)] += int(tokens - fired)
    total = sum(table.values())
    found = 0.0
    for (acts, domain), count in table.items():
        if count:
            of_state = sum(n for (a, _), n in table.items() if a == acts) / total
            of_domain = sum(n for (_, d), n in table.items() if d == domain) / total
            found += count / total * math.log(count / total / of_state / of_domain)
    return found


def test_mutual_information_is_that_of_the_table(activity):
    found = mutual_information(activity, DOMAINS)
    assert found == pytest.approx([slow_information(activity, unit) for unit in range(3)])
    assert found[0] == pytest.approx(math.log(2))
    assert found[2] == 0


def test_information_stands_beside_permuted_rows(activity):
    found = information(activity, DOMAINS, seed=0)
    assert found.above_null in (0.5, 1.0)  # unit 0, and unit 1 once in twenty
    assert found.mean > 10 * found.null
    meaningless = activity._replace(fired=activity.fired[:, 1:])
    assert information(meaningless, DOMAINS, seed=1).null > 0
    silent = activity._replace(fired=activity.fired[:, 2:])
    assert information(silent, DOMAINS, seed=0) == (0.0, 0.0, 0.0)


def test_load_counts_what_never_acts(activity):
    found = load(activity)
    assert found.alive == pytest.approx(2 / 3)
    rates = np.array([0.5, activity.fired[:, 1].mean() / TOKENS, 0.0])
    assert found.cv2 == pytest.approx(rates.var() / rates.mean() ** 2)
    assert found.largest == rates.max()


def test_rates_are_of_each_domains_tokens(activity):
    assert activity.rates(DOMAINS)[:, 0].tolist() == [1.0, 0.0]
    assert len(activity.half(1).tokens) == ROWS // 2


def test_own_units_and_their_controls():
    draws = np.random.default_rng(0)
    rates = draws.random((2, 100)) * 0.1
    rates[0, [7, 9]] = 0.9
    rates[:, 20:50] = 0.9  # as often, and on both
    norms = np.ones(100)
    norms[20:30] = 100.0
    own = own_units(rates, 0)
    assert sorted(own) == [7, 9]
    found = matched_units(rates[0], norms, own, draws)
    assert len(set(found)) == 2
    assert all(30 <= unit < 50 for unit in found)  # of the same norm too
    assert len(matched_units(rates[0, :3], norms[:3], np.array([0, 1]), draws)) == 1


def test_overlap_is_jaccards_beside_that_of_random_sets():
    rates = np.zeros((2, 40))
    rates[0, :4], rates[1, 2:6] = 1.0, 1.0
    found, chance = overlap(rates)
    assert found == pytest.approx(2 / 6)
    assert chance == pytest.approx(0.1 / 1.9)


def test_selectivity_is_the_rise_on_the_domain_above_the_others():
    rise = {"law": 0.5, "math": 0.1, "code": 0.3}
    one = SwitchedOff(domain="law", units=2, own=rise, control=rise)
    assert one.selectivity(rise) == pytest.approx(0.3)
