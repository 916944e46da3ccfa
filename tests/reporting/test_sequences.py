from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from steerlora.cli import compose, sections
from steerlora.evaluation.forgetting import forgetting_metrics
from steerlora.evaluation.records import DomainSequence, GeneralKnowledge
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import holm
from steerlora.reporting.orders import MAX_ORDERS, forgetting_table, order_effects_table
from steerlora.reporting.own_method import aims, method_table
from steerlora.reporting.sequences import (
    apart_by_replay,
    final,
    forgotten,
    kept,
    mean,
    p_value,
    ratio,
    twins,
)

DOMAINS = ("instruction", "math", "code")
OWN = "sc_lora_context"


def record(method, sequence, seed, lost, *, order=None, general=None, replay=0.0):
    """Learns every domain to 0.8 and loses ``lost`` of it at once; the base scores 0."""
    matrix = np.zeros((len(sequence) + 1, len(DOMAINS)))
    for stage, domain in enumerate(sequence, start=1):
        matrix[stage:, DOMAINS.index(domain)] = 0.8 - lost
        matrix[stage, DOMAINS.index(domain)] = 0.8
    if general is not None:
        general = GeneralKnowledge(before=Estimate(0.8, 0.0), after=Estimate(general, 0.0))
    return DomainSequence(
        model="m",
        method=method,
        seed=seed,
        fingerprint=f"{method}-{'-'.join(sequence)}-{seed}",
        order=order or "-".join(sequence),
        sequence=tuple(sequence),
        broad="instruction",
        domains=DOMAINS,
        matrix=matrix.tolist(),
        stderr=np.zeros_like(matrix).tolist(),
        items=50,
        metrics=forgetting_metrics(matrix, sequence=sequence, domains=DOMAINS),
        general=general,
        replay=replay,
    )


FIRST = ("instruction", "math", "code")
LAST = ("math", "code", "instruction")
MIDDLE = ("code", "instruction", "math")


def test_every_order_is_compared_with_its_own_twin():
    records = [
        record("lora", FIRST, 0, 0.2),
        record("lora", LAST, 0, 0.5),
        record("lora", FIRST, 1, 0.3),
        record("lora", LAST, 1, 0.7),
        record("lora", MIDDLE, 0, 0.9),  # its twin, instruction-code-math, was not run
        record("lora", LAST, 2, 0.9),  # nor was its twin under this seed
    ]
    effect = twins(records)
    assert (effect.pairs, effect.orders) == (2, 1)
    assert effect.first == pytest.approx(0.25)
    assert effect.later == pytest.approx(0.6)
    differences = [-0.3, -0.4]
    interval = effect.difference.interval
    assert interval.value == pytest.approx(-0.35)
    assert interval[1:3] == pytest.approx(
        stats.t.interval(0.95, 1, loc=-0.35, scale=stats.sem(differences))
    )
    assert effect.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    with_twin = [*records, record("lora", ("instruction", "code", "math"), 0, 0.1)]
    assert (twins(with_twin).pairs, twins(with_twin).orders) == (3, 2)
    assert twins([record("lora", FIRST, 0, 0.2)]) is None


def test_one_twin_may_serve_several_orders():
    records = [record("lora", FIRST, 0, 0.2), record("lora", LAST, 0, 0.5)]
    records += [record("lora", ("math", "instruction", "code"), 0, 0.4)]
    effect = twins(records)
    assert (effect.pairs, effect.orders) == (2, 2)
    assert effect.difference.interval.value == pytest.approx(-0.25)
    assert not effect.difference.interval.known  # one replicate


def test_order_effects_table_has_a_row_a_method_with_pairs(methods):
    records = [
        record(name, o, s, 0.3 + 0.1 * s * (o == LAST))
        for name in ("lora", "a") for o in (FIRST, LAST) for s in (0, 1)
    ]  # fmt: skip
    records += [record("alone", LAST, 0, 0.3)]
    table = order_effects_table(records, methods)
    assert list(table.data.method) == ["lora", "a"]
    assert [row[2].text for row in table.rows] == ["2 (1)", "2 (1)"]
    assert table.rows[0][5].text == "−0.050 [−0.685, +0.585]"
    p_value = stats.ttest_1samp([0.0, -0.1], 0).pvalue
    assert table.data.p_holm.tolist() == pytest.approx([min(1, 2 * p_value)] * 2)
    assert order_effects_table(records[-1:], methods) is None


def test_ratio_and_p_value_use_only_runs_that_both_have():
    records = [record("lora", FIRST, seed, 0.4 + 0.01 * seed) for seed in range(4)]
    records += [record("own", FIRST, seed, 0.1) for seed in range(3)]
    records += [record("own", LAST, 0, 0.8)]  # lora never ran it
    measure = ratio(records, "own", "lora", forgotten)
    assert measure.interval.value == pytest.approx(0.1 / 0.41)
    assert measure.seeds == (0, 1, 2)
    assert ratio(records, "own", "lora", final).interval.value > 1
    differences = [0.1 - 0.4, 0.1 - 0.41, 0.1 - 0.42]
    assert p_value(records, "own", "lora", forgotten) == pytest.approx(
        stats.ttest_1samp(differences, 0).pvalue
    )
    assert ratio(records, "own", "absent", forgotten) is None
    assert np.isnan(p_value(records, "own", "absent", forgotten))


def test_orders_are_no_replicates():
    """Runs of one replicate count once, over the orders that both methods ran in it."""
    lost = {"lora": {FIRST: 0.4, LAST: 0.6}, "own": {FIRST: 0.1, LAST: 0.3}}
    records = [
        record(name, order, seed, value + 0.02 * seed)
        for name, orders in lost.items()
        for order, value in orders.items()
        for seed in (0, 1)
        if (name, order, seed) != ("own", LAST, 1)
    ]
    measure = ratio(records, "own", "lora", forgotten)
    assert measure.numerator == pytest.approx((0.2, 0.12))
    assert measure.denominator == pytest.approx((0.5, 0.42))
    assert mean(records[:4], forgotten).numerator == pytest.approx((0.5, 0.52))


def test_general_knowledge_kept():
    records = [record("own", FIRST, seed, 0.1, general=0.6 + 0.1 * seed) for seed in range(2)]
    interval = kept(records).interval
    assert interval.value == pytest.approx(0.65 / 0.8)
    assert interval.high - interval.value == pytest.approx(12.706 * 0.05 / 0.8, rel=1e-4)
    unmeasured = [record("own", FIRST, 2, 0.1)]
    assert kept([*records, *unmeasured]) == kept(records)
    assert kept(unmeasured) is None
    assert mean([], forgotten) is None


def test_replay_has_a_name_of_its_own_only_where_there_is_need():
    plain, replayed = record("a", FIRST, 0, 0.1), record("a", FIRST, 0, 0.1, replay=0.2)
    assert [r.method for r in apart_by_replay([plain, replayed])] == ["a", "a replay 0.2"]
    assert [r.method for r in apart_by_replay([replayed, replayed])] == ["a", "a"]


def test_every_variant_of_our_own_method_that_is_shipped_is_named_in_the_study():
    study = compose.load([]).study
    options = {name for options in sections.groups().values() for name in options}
    shipped = {name for name in options if name.startswith(f"{OWN}_")}
    assert study.own_method == OWN
    assert set(study.variants) == shipped


def study(
    own_lost=0.02, general=0.8, orders=(FIRST, LAST, MIDDLE, ("code", "math", "instruction"))
):
    """Four orders and three seeds of LoRA, our method and two switches."""
    lost = {"lora": 0.7, "sc_lora": 0.5, OWN: own_lost}
    lost |= {f"{OWN}_soft": 0.3, f"{OWN}_free": 0.4}
    return [
        record(name, order, seed, part * (1 + 0.01 * seed), general=general if name == OWN else 0.3)
        for name, part in lost.items()
        for order in orders
        for seed in range(3)
    ]


def p_holm(method, against=OWN):
    """Of a method among all that `study` compares, from what it makes them lose."""
    lost = {"lora": 0.7, "sc_lora": 0.5, OWN: 0.02, f"{OWN}_soft": 0.3, f"{OWN}_free": 0.4}
    seeds = 1 + 0.01 * np.arange(3)
    others = [name for name in lost if name != against]
    tests = [stats.ttest_rel(lost[name] * seeds, lost[against] * seeds) for name in others]
    return holm([test.pvalue for test in tests])[others.index(method)]


def test_method_table(methods):
    table = method_table(study(), "m", methods, meaningful=True)
    data = table.data.set_index("method")
    assert list(data.index) == ["lora", "sc_lora", OWN, f"{OWN}_soft", f"{OWN}_free"]
    assert [row[0].text for row in table.rows][2:] == [
        OWN,
        f"{OWN}: soft gate",
        f"{OWN}: nothing frozen",
    ]
    own = data.loc[OWN]
    assert own.positive_forgetting == pytest.approx(0.0202)
    assert own.positive_forgetting_stderr == pytest.approx(stats.sem([0.02, 0.0202, 0.0204]))
    assert own.forgetting_ratio == pytest.approx(0.02 / 0.7)
    assert own.final_average == pytest.approx(0.8 - 2 / 3 * 0.0202)
    assert own.general == pytest.approx(1.0)
    assert (own.runs, own.orders, own.seeds) == (12, 4, 3)
    assert np.isnan(own.p_holm)
    assert table.rows[2][1].text == "4 × 3"
    assert table.rows[2][2].best
    assert not table.rows[0][2].best
    assert data.loc["lora"].p_holm == pytest.approx(p_holm("lora"))
    assert np.isnan(data.loc["lora"].forgetting_ratio)


def test_a_method_with_missing_runs_says_how_many_it_has(methods):
    records = [r for r in study() if (r.method, r.seed, r.order) != ("lora", 0, FIRST)]
    table = method_table(records[1:], "m", methods, meaningful=True)
    assert table.rows[0][1].text == "11 runs"


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ("met", "met", "met")),
        ({"own_lost": 0.25}, ("not met", "met", "not met")),
        ({"general": 0.7}, ("met", "not met", "met")),
        ({"general": None}, ("met", "not measured", "met")),
    ],
)
def test_aims(changes, verdicts, methods):
    records = study(**changes)
    assert tuple(aim.verdict for aim in aims(records, methods)) == verdicts
    notes = method_table(records, "m", methods, meaningful=True).notes
    assert [note.split(": ")[1].split(" ")[0].rstrip(".") for note in notes[:3]] == [
        verdict.split(" ")[0] for verdict in verdicts
    ]
    assert "Orders: 4, replicates: 3." in notes[3]


def test_an_aim_that_the_interval_only_touches_is_not_met(methods):
    spread = {0: 0.2, 1: 1.0, 2: 1.8}
    records = [
        record(r.method, r.sequence, r.seed, 0.1 * spread[r.seed]) if r.method == OWN else r
        for r in study()
    ]
    forgetting = aims(records, methods)[0]
    interval = forgetting.measure.interval
    assert interval.value < 0.2 < interval.high
    assert forgetting.verdict == "not met"


def test_aims_of_one_replicate_are_undecided(methods):
    records = [r for r in study() if r.seed == 0]
    assert [aim.verdict for aim in aims(records, methods)] == ["undecided"] * 3
    note = method_table(records, "m", methods, meaningful=True).notes[0]
    assert note == "Positive forgetting at most 0.2 of lora's: undecided (0.029)."


def test_without_the_baseline_or_with_too_few_orders(methods):
    without = [r for r in study() if r.method != "lora"]
    assert [aim.verdict for aim in aims(without, methods)] == [
        "not measured",
        "met",
        "not measured",
    ]
    few = method_table(study(orders=(FIRST,)), "m", methods, meaningful=True)
    assert few.notes[3].endswith("Orders: 1, replicates: 3; the aims ask for at least 4 and 3.")
    assert (
        method_table([r for r in study() if r.method != OWN], "m", methods, meaningful=True) is None
    )
    assert method_table(study(), "another", methods, meaningful=True) is None


def test_forgetting_table_has_general_knowledge_and_p_values(methods):
    table = forgetting_table(study(), methods, meaningful=True)
    rows = table.data[table.data.order == "all"].set_index("method")
    assert rows.loc[OWN].general == pytest.approx(1.0)
    assert rows.loc["lora"].general == pytest.approx(0.375)
    assert rows.loc[OWN].p_holm == pytest.approx(p_holm(OWN, against="lora"))
    assert np.isnan(rows.loc["lora"].p_holm)
    # Orders are no replicates: one order tells as much here as all four do.
    by_order = table.data[table.data.order == "-".join(LAST)].set_index("method")
    assert by_order.loc[OWN].p_holm == pytest.approx(rows.loc[OWN].p_holm)
    assert "General kept" in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    bare = [replace(r, general=None) for r in study()]
    assert "General kept" not in forgetting_table(bare, methods, meaningful=True).columns


def test_many_orders_are_left_to_the_csv_file(methods):
    records = [
        record("lora", FIRST, 0, 0.3, order=f"permutation_{index}")
        for index in range(MAX_ORDERS + 1)
    ]
    table = forgetting_table(records, methods, meaningful=True)
    assert [row[1].text for row in table.rows] == ["all orders", "broad domain first"]
    assert len(table.data) == 2 + MAX_ORDERS + 1
    assert "CSV" in table.caption
