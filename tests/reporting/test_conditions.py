"""Conditions are what differs in more than seeds; their differences are paired and adjusted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.artifacts import store_evaluation
from helpers.world import World

from steerlora.engine.lineage import Library
from steerlora.evaluation.statistics import paired_test, t_interval
from steerlora.reporting.conditions import conditions, differences, letter
from steerlora.reporting.run_rows import row_of


def shifted(record, by):
    """The record with every item of every task changed alike, so that its mean changes by that."""
    tasks = {
        name: replace(s, value=s.value + by, per_item=[item + by for item in s.per_item])
        for name, s in record.tasks.items()
    }
    averages = {n: replace(a, value=a.value + by) for n, a in record.averages.items()}
    return replace(record, tasks=tasks, averages=averages)


def noisy(record, by, seed):
    """The record with items changed by ``by`` on average, and by noise of their own."""
    rng = np.random.default_rng(seed)
    tasks = {}
    for name, score in record.tasks.items():
        noise = rng.normal(0, 0.05, score.items)
        items = np.array(score.per_item) + by + noise - noise.mean()
        tasks[name] = replace(score, value=float(items.mean()), per_item=items.tolist())
    return replace(shifted(record, by), tasks=tasks)


@pytest.fixture
def several(tmp_path):
    """``several({rank: [records]})``: the conditions of these evaluations."""

    def build(records):
        names = [
            store_evaluation(tmp_path, record, rank=rank)
            for rank, own in records.items()
            for record in own
        ]
        library = Library(tmp_path)
        return conditions([row_of(library.find(name), library) for name in names])

    return build


def test_replicates_are_one_condition(several):
    world = World()
    found = several({r: [world.evaluation("micro_m", "lora", s) for s in (0, 1)] for r in (2, 8)})
    assert [(one.name, len(one.rows)) for one in found] == [("A", 2), ("B", 2)]
    assert [one.settings["method.rank"] for one in found] == [2, 8]


def test_replicates_are_paired_by_seed_whatever_their_order(several):
    world = World()
    gains = {0: 0.060, 1: 0.061, 2: 0.062}
    base = {seed: world.evaluation("micro_m", "lora", seed) for seed in gains}
    better = [shifted(base[seed], gains[seed]) for seed in (2, 0, 1)]
    found = {one.figure: one for one in differences(several({2: [*base.values()], 8: better}))}
    target = found["average/target"]
    expected = t_interval(list(gains.values()))
    assert target.replicates == 3
    assert (target.value, target.low, target.high) == pytest.approx(expected[:3])
    assert target.verdict == "holds up"
    # Holm: the smallest of the p-values counts as often as there are differences
    assert target.p_value >= paired_test(list(gains.values())) * len(found) * 0.999


def test_one_pair_is_compared_item_by_item(several):
    record = World().evaluation("micro_m", "lora", 0)
    better = noisy(record, 0.05, seed=1)
    found = {one.figure: one for one in differences(several({2: [record], 8: [better]}))}
    law = found["target/law"]
    items = np.array(better.tasks["world_law"].per_item) - record.tasks["world_law"].per_item
    error = items.std(ddof=1) / math.sqrt(len(items))
    assert law.replicates == 1
    assert law.high - law.value == pytest.approx(1.959964 * error, rel=1e-5)
    # unpaired, the noise that the two have in common would hide it
    assert error < 0.6 * math.hypot(record.tasks["world_law"].stderr, law.value)
    assert law.verdict == "holds up"


def test_noise_does_not_hold_up(several):
    record = World().evaluation("micro_m", "lora", 0)
    twin = noisy(record, 0.0, seed=2)
    assert {one.verdict for one in differences(several({2: [record], 8: [twin]}))} <= {
        "not shown",
        "none",
    }


def test_equal_scores_are_no_difference(several):
    record = World().evaluation("micro_m", "lora", 0)
    found = differences(several({2: [record], 8: [record]}))
    assert {one.verdict for one in found} == {"none"}


def test_conditions_without_a_seed_in_common_are_not_compared(several):
    world = World()
    found = several({r: [world.evaluation("micro_m", "lora", s)] for r, s in ((2, 0), (8, 1))})
    assert len(found) == 2
    assert differences(found) == []


def test_letters():
    assert [letter(number) for number in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]
