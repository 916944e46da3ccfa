"""The report on routing signals, from invented records: claims, tables, figure."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from steerlora.evaluation.routing_signals import (
    CONDITIONS,
    DOMAINS,
    HIDDEN,
    LAST,
    NOISE,
    PROJECTION,
    ROWS,
    SAE,
    SHARED,
    SIGNALS,
    TOKENS,
    UNTRAINED,
    Pair,
    RoutingSignals,
)
from steerlora.reporting.routing_signals import (
    accuracy_figure,
    accuracy_table,
    pairs_table,
    signal_claims,
    write_routing_signals,
)
from steerlora.reporting.verdicts import (
    DIRECTION,
    NO_VERDICT,
    NOT_MEASURED,
    NOT_REPRODUCED,
    UNDECIDED,
)

LEVELS = {
    TOKENS: [1, 2, 4, 8],
    SHARED: [0, 0.5, 0.9],
    DOMAINS: [2, 4, 8],
    NOISE: [0, 0.5],
    ROWS: [4, 64],
}
MORE = {SAE: 0.1, UNTRAINED: 0.02, PROJECTION: 0.01}


def record(seed: int, more: dict[str, float] | None = None, pairs: bool = True) -> RoutingSignals:
    """Every signal scores 0.6, and so much more."""
    draws = np.random.default_rng(seed)
    more = MORE if more is None else more
    accuracy = {
        name: {
            signal: [0.6 + more.get(signal, 0.0) + draws.normal(0, 0.0005) for _ in levels]
            for signal in SIGNALS
        }
        for name, levels in LEVELS.items()
    }
    told = {signal: 0.7 + more.get(signal, 0.0) + draws.normal(0, 0.0005) for signal in SIGNALS}
    other = dict.fromkeys(SIGNALS, 0.9)
    found = (
        Pair(domains=("a", "b"), likeness=0.2, accuracy=other),
        Pair(domains=("a", "c"), likeness=0.9, accuracy=told),
        Pair(domains=("b", "c"), likeness=0.3, accuracy=other),
    )
    return RoutingSignals(
        model="micro_m",
        method="sc_lora_context",
        seed=seed,
        fingerprint=f"signals-{seed}",
        site=1,
        levels=LEVELS,
        accuracy=accuracy,
        chance={name: [0.1] * len(levels) for name, levels in LEVELS.items()},
        best={SHARED: [1.0, 0.9, 0.4]},
        pairs=found if pairs else (),
        items=512,
    )


def verdicts(records) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in signal_claims(records)}


def test_where_features_do_better_everything_says_so():
    found = verdicts([record(seed) for seed in range(3)])
    assert set(found.values()) == {DIRECTION}
    assert list(found) == [f"R{number}" for number in range(1, 9)]


@pytest.mark.parametrize(
    ("more", "refuted"),
    [
        ({HIDDEN: 0.1, LAST: 0.1}, {f"R{number}" for number in range(1, 9)}),
        ({SAE: 0.1, LAST: 0.1}, {f"R{number}" for number in range(1, 8)}),  # one rival is enough
        ({SAE: 0.1, UNTRAINED: 0.1}, {"R8"}),
    ],
)
def test_where_they_do_not_it_says_that(more, refuted):
    found = verdicts([record(seed, more) for seed in range(3)])
    assert {name for name, verdict in found.items() if verdict == NOT_REPRODUCED} == refuted


def test_a_claim_is_about_the_harder_half_of_the_levels():
    """Better after 1 and 2 tokens alone, and among 4 and 8 domains alone."""
    records = [record(seed, {}) for seed in range(3)]
    for one in records:
        for name, places in ((TOKENS, (0, 1)), (DOMAINS, (1, 2))):
            for place in places:
                one.accuracy[name][SAE][place] += 0.2
    found = verdicts(records)
    assert (found["R1"], found["R3"]) == (DIRECTION, DIRECTION)
    assert found["R2"] == found["R4"] == NOT_REPRODUCED


def test_one_replicate_decides_nothing_and_what_is_missing_is_not_measured():
    assert set(verdicts([record(0)]).values()) == {UNDECIDED}
    assert verdicts([record(seed, pairs=False) for seed in range(3)])["R6"] == NOT_MEASURED
    smoke = signal_claims([record(0)], meaningful=False)
    assert {claim.verdict for claim in smoke} == {NO_VERDICT}


def test_tables_have_a_row_a_level_and_a_row_a_pair():
    records = [record(seed) for seed in range(3)]
    data = accuracy_table(records).data
    assert len(data) == sum(map(len, LEVELS.values()))
    row = data[(data.condition == NOISE) & (data.level == 0.5)].iloc[0]
    differences = [r.accuracy[NOISE][SAE][1] - r.accuracy[NOISE][HIDDEN][1] for r in records]
    assert row.difference == pytest.approx(np.mean(differences))
    assert row.difference_low < row.difference < row.difference_high
    pairs = pairs_table(records).data
    assert pairs.likeness.tolist() == pytest.approx([0.9, 0.3, 0.2])
    assert pairs_table([record(0, pairs=False)]) is None


def test_the_figure_has_a_panel_a_condition():
    figure = accuracy_figure([record(seed) for seed in range(3)])
    assert sum(axis.get_visible() for axis in figure.axes) == len(CONDITIONS)
    labels = figure.legends[0].get_texts()
    assert len(labels) == len(SIGNALS)


def test_the_report_is_written(tmp_path):
    study = SimpleNamespace(
        name="routing_signals", meaningful=True, vary=["base", "sae", "adapter"]
    )
    config = SimpleNamespace(study=study, results=SimpleNamespace(dir=str(tmp_path)))
    written = write_routing_signals(config, [record(seed) for seed in range(3)], {})
    names = {file.name for file in written.files}
    assert {"accuracy.png", "accuracy.csv", "pairs.md", "claims.json", "results.md"} <= names
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert claims[0]["measures"][0]["label"] == "less hidden states"
    assert json.loads((tmp_path / "provenance.json").read_text())["artifacts"] == [
        "signals-0", "signals-1", "signals-2",
    ]  # fmt: skip
