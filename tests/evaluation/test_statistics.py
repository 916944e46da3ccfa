from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steerlora.evaluation.statistics import (
    Paired,
    Runs,
    combined_error,
    effect_size,
    holm,
    paired_difference,
    paired_drop,
    paired_drop_difference,
    paired_test,
    run_difference,
    standard_error,
    summary_difference,
    summary_mean,
    summary_ratio,
    summary_reduction,
)


def binary(rng, probability, shape):
    return (rng.random(shape) < probability).astype(float)


def test_standard_error_and_combined_error():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / np.sqrt(3))
    assert standard_error([1.0]) == standard_error([]) == 0.0
    assert standard_error([0.5] * 9) == 0.0
    assert combined_error([0.5], [0.1]) == pytest.approx(0.1)
    assert combined_error([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]) == pytest.approx(
        np.hypot(1 / np.sqrt(3), 0.2)
    )


def test_difference_interval_of_one_seed_is_the_paired_normal_interval():
    rng = np.random.default_rng(0)
    baseline = rng.normal(0, 1, (1, 400))
    treatment = baseline + 0.2 + rng.normal(0, 0.3, (1, 400))
    interval = paired_difference([Paired(baseline, treatment)])
    difference = treatment - baseline
    half = 1.96 * stats.sem(difference[0])
    assert interval.value == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half)
    assert (interval.seeds, interval.items) == (1, 400)


def test_interval_of_a_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        items = rng.normal(0, 1, 60)
        baseline = items + rng.normal(0, 0.5, (8, 60))
        treatment = items + 0.3 + rng.normal(0, 0.5, (8, 60)) + rng.normal(0, 0.2, (8, 1))
        interval = paired_difference([Paired(baseline, treatment)])
        covered += interval.low <= 0.3 <= interval.high
    assert 0.85 <= covered / 200 <= 0.99


def test_seeds_widen_the_interval():
    items = np.random.default_rng(2).normal(0, 1, 500)
    baseline = np.tile(items, (4, 1))
    same = paired_difference([Paired(baseline, baseline + 0.2)])
    shifts = np.array([0.0, 0.1, 0.3, 0.4])[:, None]
    apart = paired_difference([Paired(baseline, baseline + shifts)])
    assert same.high - same.low == pytest.approx(0.0, abs=1e-9)
    assert apart.value == pytest.approx(same.value)
    assert apart.high - apart.low > 0.1


def test_drop_is_a_ratio_of_means_over_strata():
    first = Paired(np.full((2, 10), 0.9), np.full((2, 10), 0.3))
    second = Paired(np.full((2, 30), 0.3), np.full((2, 30), 0.3))
    interval = paired_drop([first, second])
    # Means over domains 0.6 and 0.3: 50 %, not the mean of 66.7 % and 0 %, nor weighted by items.
    assert interval == (pytest.approx(50.0), pytest.approx(50.0), pytest.approx(50.0), 2, 40)


def test_drop_of_a_baseline_that_can_vanish_has_no_interval():
    rare = np.zeros((1, 50))
    rare[0, 0] = 1.0  # some resamples have no success at all
    assert not paired_drop([Paired(rare, rare)]).known
    negative = np.full((1, 50), -2.0)
    assert np.isnan(paired_drop([Paired(negative, negative)]).value)


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    rng = np.random.default_rng(3)
    data = [Paired(binary(rng, 0.9, (2, 100)), binary(rng, 0.4, (2, 100)))]
    assert paired_drop(data, seed=1) == paired_drop(data, seed=1)
    assert paired_drop(data, seed=1).low != paired_drop(data, seed=2).low


def test_drop_difference_is_paired():
    rng = np.random.default_rng(4)
    intact = binary(rng, 0.9, (2, 200))
    shuffled, inverted, fixed = (intact * binary(rng, p, (2, 200)) for p in (0.5, 0.3, 0.9))
    controls = [[Paired(intact, shuffled)], [Paired(intact, inverted)]]
    spared = [Paired(intact, fixed)]
    interval = paired_drop_difference(controls, spared)
    drops = [paired_drop(strata).value for strata in [*controls, spared]]
    assert interval.value == pytest.approx(np.mean(drops[:2]) - drops[2])
    assert interval.low < interval.value < interval.high
    same = paired_drop_difference([spared], spared)
    assert same[:3] == (pytest.approx(0.0), pytest.approx(0.0), pytest.approx(0.0))


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="same seeds and items"):
        paired_difference([Paired(np.ones((2, 5)), np.ones((2, 6)))])


def test_reduction_worked_by_hand():
    lora = Runs(np.array([[0.4, 0.5], [0.6, 0.5]]), np.zeros((2, 2)))
    own = Runs(np.array([[0.2, 0.3], [0.3, 0.2]]), np.zeros((2, 2)))
    interval = summary_reduction(lora, own, items=200)
    assert interval.value == pytest.approx(100 * (1 - 0.25 / 0.5))
    assert interval.low < interval.value < interval.high
    assert (interval.seeds, interval.items) == (2, 200)


def test_reduction_uses_only_runs_that_both_have():
    lora = Runs(np.array([[0.4, 0.9]]), np.zeros((1, 2)))
    own = Runs(np.array([[0.3, np.nan]]), np.zeros((1, 2)))
    interval = summary_reduction(lora, own, items=10)
    assert interval.value == pytest.approx(25.0)
    assert interval.seeds == 1


def test_one_run_still_has_the_error_of_its_items():
    exact = Runs(np.array([[0.5]]), np.array([[0.0]]))
    noisy = Runs(np.array([[0.4]]), np.array([[0.02]]))
    interval = summary_difference(exact, noisy, items=200)
    assert interval.value == pytest.approx(-0.1)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.02, rel=0.1)


def test_ratio_is_what_the_reduction_leaves():
    rng = np.random.default_rng(7)
    lora = Runs(0.5 + 0.05 * rng.normal(size=(4, 3)), np.full((4, 3), 0.02))
    own = Runs(0.1 + 0.05 * rng.random((4, 3)), np.full((4, 3), 0.01))
    ratio, reduction = summary_ratio(lora, own, items=9), summary_reduction(lora, own, items=9)
    assert ratio.value == pytest.approx(own.values.mean() / lora.values.mean())
    assert ratio[:3] == tuple(
        pytest.approx(1 - reduction[place] / 100) for place in (0, 2, 1)
    )  # its bounds change places
    assert not summary_ratio(Runs(np.zeros((4, 3)), np.zeros((4, 3))), own, items=1).known


def test_item_noise_is_common_to_all_runs_and_does_not_average_out():
    few = Runs(np.full((1, 1), 0.5), np.full((1, 1), 0.02))
    many = Runs(np.full((5, 4), 0.5), np.full((5, 4), 0.02))
    for runs in (few, many):
        interval = summary_mean(runs, items=200)
        assert interval.value == pytest.approx(0.5)
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.02, rel=0.1)


def test_mean_of_runs_takes_in_how_orders_and_seeds_differ():
    values = np.array([[0.2, 0.4], [0.6, 0.8], [0.3, np.nan]])
    interval = summary_mean(Runs(values, np.zeros((3, 2))), items=7)
    assert interval.value == pytest.approx(np.nanmean(values))
    assert interval.low < 0.35 < 0.6 < interval.high
    assert (interval.seeds, interval.items) == (2, 7)


def test_reduction_of_no_forgetting_is_unknown():
    nothing = Runs(np.zeros((2, 2)), np.zeros((2, 2)))
    assert not summary_reduction(nothing, nothing, items=1).known
    absent = Runs(np.full((1, 1), np.nan), np.zeros((1, 1)))
    assert not summary_reduction(absent, absent, items=1).known


def test_run_difference_needs_two_runs():
    assert not run_difference([0.2], [0.9]).known
    interval = run_difference([0.2, 0.3, 0.25], [0.9, 0.8, 0.85])
    assert interval.value == pytest.approx(0.6)
    assert 0.5 <= interval.low <= interval.high <= 0.7


def test_holm_worked_by_hand():
    # Sorted 0.01, 0.03, 0.04 -> 0.03, max(0.03, 0.06), max(0.06, 0.04).
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).size == 0
    # A test that could not be made is none of the tests that are counted.
    assert holm([np.nan, 0.01, 0.03]).tolist() == pytest.approx([np.nan, 0.02, 0.03], nan_ok=True)


def test_paired_test():
    rng = np.random.default_rng(5)
    items = rng.normal(0, 5, 200)  # far larger than the effect: an unpaired test would miss it
    assert paired_test(items, items + 0.2 + rng.normal(0, 0.5, 200)) < 0.01
    assert paired_test(items, items) == 1.0
    assert np.isnan(paired_test([1.0], [2.0]))


def test_paired_test_of_few_pairs_counts_every_sign_pattern():
    # All of one sign: both ends of the 2^n patterns are as extreme.
    assert paired_test([0, 0, 0, 0], [1, 2, 3, 4]) == pytest.approx(2 / 16)
    assert paired_test(np.zeros(10), np.arange(10) + 1.0) == pytest.approx(2 / 1024)
    # One of three against: sums 6, 4, 2, 0 and their negatives; 4 is met by 2 of 8 on each side.
    assert paired_test([1, 0, 0], [0, 2, 3]) == pytest.approx(4 / 8)
    assert paired_test([0, 0], [1, 1]) == paired_test([0, 0], [-1, -1]) == 0.5
    assert paired_test([0, 0, 0], [0, 0, 0]) == 1.0


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


def test_paired_test_rejects_a_true_null_about_as_often_as_it_says():
    rng = np.random.default_rng(6)
    p_values = [paired_test(*rng.normal(0, 1, (2, 20)), seed=i) for i in range(200)]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.1
