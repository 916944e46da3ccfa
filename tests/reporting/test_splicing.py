"""The report on SAEs in place of streams: shares, claims and verdicts, from invented records."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.splicing import WAYS, Cost, Latents, RowLosses, Splicing, Stream
from steerlora.reporting.splicing.claims import splicing_claims
from steerlora.reporting.splicing.report import write_splicing
from steerlora.reporting.splicing.shares import Study, flops_to_reach
from steerlora.reporting.splicing.tables import scores_table, shares_table, streams_table
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    NO_VERDICT,
    NOT_MEASURED,
    NOT_REPRODUCED,
    UNDECIDED,
)

REFERENCES = {"tuned": "saes", "end_to_end": "saes", "tuned_and_lora": "saes"}
CLOSED = {
    **{"saes": 0.0, "tuned": 0.38, "end_to_end": 0.1, "lora": 0.42, "lora_50_steps": 0.2},
    **{"rank_1": 0.36, "rank_4": 0.4, "rank_4_alpha_32": 0.41, "all_layers": 0.44, "k2": 0.5},
    **{"k8": 0.37, "two_saes": 0.45, "map": 0.35, "tuned_and_lora": 0.46},
    **{"cross_entropy": 0.03, "random_dictionary": 0.3, "noise": 0.05, "shuffled_teacher": -2.0},
}
"""{condition: share of the gap}: a world in which the paper is right, and Karvonen too."""
FLOPS = {"lora_50_steps": 1e10, "lora": 4e10, "end_to_end": 1e11}


def record(condition: str, seed: int, closed: float, *, gap: float = 1.0) -> Splicing:
    """200 rows; the SAE's gap is ``gap`` nats a row on average."""
    rows = np.random.default_rng(seed)
    base = rows.normal(40, 8, 200)
    each = gap * rows.gamma(2.0, 0.5, 200)
    own = np.random.default_rng([seed, *condition.encode()])
    tuned = condition in REFERENCES  # its SAEs are others
    method = base + each * (1 - closed - own.normal(0, 0.005))
    losses = {"base": base, "saes": method if tuned else base + each, "method": method}
    losses["adapter"] = base + 0.01
    return Splicing(
        model="micro_m",
        method="spliced",
        seed=seed,
        fingerprint=f"{condition}-{seed}",
        condition=condition,
        sites=(1,),
        tokens=[20] * 200,
        losses={
            way: RowLosses(cross_entropy=v.tolist(), kl=(v - base).tolist())
            for way, v in losses.items()
        },
        streams={
            way: {layer: Stream(distance=0.1 * layer, cosine=0.9) for layer in (1, 2)}
            for way in ("saes", "method")
        },
        latents={way: {1: Latents(l0=16.0, alive=0.9)} for way in ("saes", "method")},
        scores={
            way: {"facts": Estimate(0.98 - 0.001 * seed * (way == "adapter"), 0.01)} for way in WAYS
        },
        parameters=1000,
        cost=Cost(tokens=1e5, flops=FLOPS.get(condition, 2e10), seconds=10.0),
    )


def study(seeds=(0, 1, 2), gap: float = 1.0, **changes: float | None) -> Study:
    """The world with some shares changed; None: the condition is missing."""
    closed = {name: share for name, share in (CLOSED | changes).items() if share is not None}
    records = [record(name, s, share, gap=gap) for name, share in closed.items() for s in seeds]
    return Study.of(records, REFERENCES)


def verdicts(found: Study) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in splicing_claims(found)}


def test_where_the_paper_is_right_its_claims_hold():
    found = verdicts(study())
    assert found["S1"] == IN_RANGE
    assert found["S5"] == IN_RANGE
    # The paper gives no figure for these.
    assert {found[name] for name in ("S2", "S4", "S6", "S7", "S9", "K1")} == {DIRECTION}
    assert found["S3"] == found["S8"] == NOT_MEASURED


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({"lora": 0.0, "all_layers": 0.0}, "S1"),
        ({"cross_entropy": 0.42}, "S1"),  # no more than the control
        ({"k2": 0.3, "k8": 0.5}, "S2"),
        ({"rank_1": 0.6}, "S4"),
        ({"end_to_end": 0.7}, "S6"),
        ({"two_saes": -0.2}, "S7"),
        ({"tuned_and_lora": 0.85}, "K1"),
    ],
)
def test_where_it_is_wrong_they_do_not(changes, id):
    assert verdicts(study(**changes))[id] == NOT_REPRODUCED


def test_what_is_missing_is_not_measured_and_the_rest_stands():
    found = verdicts(study(k2=None, two_saes=None, tuned_and_lora=None))
    assert found["S2"] == found["S7"] == found["K1"] == NOT_MEASURED
    assert found["S4"] == DIRECTION


def test_one_replicate_decides_nothing():
    found = verdicts(study(seeds=(0,)))
    assert found["S1"] == found["S4"] == UNDECIDED
    table = shares_table(study(seeds=(0,)))
    row = table.data.set_index("condition").loc["lora"]
    assert row.share_low < row.share_percent < row.share_high  # over rows


def test_a_gap_too_small_to_judge_has_no_share():
    small = study(gap=1e-9)
    assert small.share("lora", 0) is not None  # small, and sure: rows agree
    noisy = record("lora", 0, 0.4)
    spliced = np.array(noisy.losses["base"].cross_entropy)
    spliced = spliced + np.random.default_rng(0).normal(0.02, 1, 200)
    noisy.losses["saes"].cross_entropy[:] = spliced.tolist()
    found = Study.of([noisy], {})
    assert found.share("lora", 0) is None
    assert found.too_small() == ["lora seed 0"]
    assert verdicts(found)["S7"] == NOT_MEASURED
    assert "lora seed 0" in shares_table(found).notes[0]


def test_shares_are_of_the_reference_saes():
    found = study()
    assert found.share("tuned", 1).value == pytest.approx(0.38, abs=0.02)
    assert found.share("saes", 1).value == pytest.approx(0.0, abs=0.02)
    measure = found.measure("lora", "lora")
    assert measure.interval.value == pytest.approx(42, abs=1)
    assert measure.interval.seeds == 3
    assert measure.fingerprints == ("lora-0", "lora-1", "lora-2")


def test_harm_is_judged_by_a_margin():
    found = study()
    for seed, one in found.records["lora"].items():
        one.scores["adapter"]["facts"] = Estimate(0.9 - 0.001 * seed, 0.01)
    assert verdicts(found)["S9"] == NOT_REPRODUCED


def test_flops_to_reach_a_loss_are_read_between_trainings():
    points = [(0.0, 3.0), (10.0, 2.0), (30.0, 1.5)]
    assert flops_to_reach(points, 2.5) == pytest.approx(5)
    assert flops_to_reach(points, 1.75) == pytest.approx(20)
    assert flops_to_reach(points, 1.5) == pytest.approx(30)
    assert flops_to_reach(points, 1.4) is None
    assert flops_to_reach(points, 3.1) is None
    claim = next(c for c in splicing_claims(study(end_to_end=0.9)) if c.id == "S5")
    assert claim.verdict == NOT_MEASURED
    assert "seed 0 (below)" in claim.note


def test_tables_have_a_row_a_condition():
    found = study()
    assert list(shares_table(found).data.condition) == list(CLOSED)
    assert len(streams_table(found).data) == 2 * len(CLOSED)
    assert set(scores_table(found).columns) >= {"Base", "SAEs", "Method alone"}
    row = shares_table(found).data.set_index("condition").loc["lora"]
    assert row.harm == pytest.approx(0.01 / 20)
    assert row.l0 == 16


@pytest.mark.parametrize("meaningful", [True, False])
def test_the_report_is_written_whole(meaningful, tmp_path):
    settings = {"references": REFERENCES}
    about = SimpleNamespace(
        name="spliced", meaningful=meaningful, settings=settings, vary=["base", "sae", "adapter"]
    )
    config = SimpleNamespace(study=about, results=SimpleNamespace(dir=str(tmp_path / "results")))
    records = [one for found in study().records.values() for one in found.values()]
    written = write_splicing(config, records, {"experiment": "spliced"})
    names = {file.name for file in written.files}
    assert names >= {"shares.md", "shares.csv", "streams.md", "scores.md", "claims.md"}
    assert names >= {"results.md", "provenance.json", "shares_closed.png"}
    said = json.loads((tmp_path / "results/claims.json").read_text())["claims"]
    assert [claim["id"] for claim in said] == [*(f"S{n}" for n in range(1, 10)), "K1"]
    if not meaningful:
        assert {claim["verdict"] for claim in said} == {NO_VERDICT}
