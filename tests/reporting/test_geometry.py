"""Claims on deltas, from invented records in which each holds or fails as a test wishes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steerlora.evaluation.statistics import equivalence
from steerlora.reporting.geometry.claims import geometry_claims
from steerlora.reporting.geometry.quantities import permutation_p
from steerlora.reporting.geometry.report import likeness_figure
from steerlora.reporting.geometry.tables import likeness_table, specialists_table
from steerlora.saes.geometry.likeness import Likeness
from steerlora.saes.geometry.records import (
    Deltas,
    Geometry,
    Reconstructions,
    Reference,
    Specialists,
)


def like(alignment: float, angle: float, cka: float) -> Likeness:
    return Likeness(alignment=alignment, angles={4: angle - 5, 16: angle}, cka=cka)


def invented(nearness: float = 0.0, drift: float = 0.0, own: float = 0.5) -> Geometry:
    """Delta SAEs that lie so far from chance (0) to two SAEs of one stream (1).

    Args:
        nearness: that share.
        drift: by which the cosine rises with a doubling of the rank.
        own: share of a specialist's deltas along its own features; 0.2 along others'.
    """
    generator = np.random.default_rng(0)
    deltas, references, specialists = [], [], []
    for seed in range(3):
        references.append(
            Reference(layer=2, seed=seed, likeness=like(0.6, 40, 0.8), unexplained=0.05)
        )
        for rank in (4, 8, 16, 32):
            noise = float(generator.normal(0, 0.001))
            for kind in ("trained", "equal_norm"):
                cosine = 0.3 + 0.3 * nearness + noise + drift * np.log2(rank / 4)
                deltas.append(
                    Deltas(
                        method="lora",
                        rank=rank,
                        seed=seed,
                        layer=2,
                        kind=kind,
                        update_norm=1.0,
                        stream_norm=0.1,
                        stream_rank=9.0,
                        module_rank=3.0,
                        alive=0.2 + 0.1 * np.log2(rank) + noise,
                        unexplained=0.1 + noise,
                        likeness=like(
                            cosine, 80 - 40 * nearness + 100 * noise, 0.8 * nearness + noise
                        ),
                        random=like(0.28, 82, 0.0),
                        matched=like(0.3, 80, 0.0),
                        reseeded=0.7,
                        reconstructions=Reconstructions(
                            base_raw=1.2,
                            base_refitted=0.5,
                            base_pursuit=0.2,
                            random_pursuit=0.3,
                            matched_pursuit=0.25,
                            pca=0.15,
                            pca_rank=0.4,
                        ),
                    )
                )
        noise = float(generator.normal(0, 0.01))
        eye = np.eye(3)
        specialists.append(
            Specialists(
                method="routed",
                seed=seed,
                layer=2,
                shared=(0.4 + 0.3 * eye + noise).tolist(),
                chance=np.full((3, 3), 0.3).tolist(),
                crossed=(0.5 - 0.4 * eye).tolist(),
                routed=(0.2 + noise * eye + (own - 0.2) * eye).tolist(),
                routed_random=np.full((3, 3), 0.2).tolist(),
            )
        )
    return Geometry(
        model="m",
        fingerprint="f" * 20,
        latents=64,
        k=4,
        tokens=100,
        held_out=50,
        references=tuple(references),
        deltas=tuple(deltas),
        specialists=tuple(specialists),
    )


def verdicts(record: Geometry, **given) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in geometry_claims(record, **given)}


def test_deltas_at_chance_are_far_and_the_report_says_that_it_is_chance():
    claims = {claim.id: claim for claim in geometry_claims(invented())}
    assert claims["G1"].verdict == "in range"
    assert "at chance" in claims["G1"].note
    (measure,) = claims["G1"].measures
    assert measure.interval.value == pytest.approx(1, abs=0.02)
    assert measure.interval.seeds == 12  # adapters
    assert claims["G3"].verdict == "direction reproduced"
    assert claims["G4"].verdict == "direction reproduced"
    assert claims["G5"].verdict == "direction reproduced"
    assert claims["G6"].verdict == "in range"
    assert claims["G8"].verdict == "in range"


def test_deltas_that_share_the_bases_dictionary_refute_distance():
    claims = {claim.id: claim for claim in geometry_claims(invented(nearness=1.0))}
    for name in ("G1", "G2", "G3"):
        assert claims[name].verdict == "not reproduced", name
        assert "above chance" in claims[name].note


def test_half_way_is_far_and_above_chance():
    claims = {claim.id: claim for claim in geometry_claims(invented(nearness=0.5))}
    assert claims["G1"].verdict == "direction reproduced"
    assert "above chance" in claims["G1"].note
    assert claims["G1"].measures[0].interval.value == pytest.approx(0.5, abs=0.02)


def test_a_drift_over_ranks_is_not_stable():
    assert verdicts(invented(drift=0.05))["G6"] == "not reproduced"


def test_specialists_that_ignore_their_features_are_not_aligned():
    assert verdicts(invented(own=0.2))["G8"] != "in range"
    claims = {claim.id: claim for claim in geometry_claims(invented(own=0.5))}
    assert "specialists permuted, p 0.00" in claims["G8"].note
    share = claims["G7"].measures[0].interval.value
    assert share == pytest.approx(0.25, abs=0.05)


def test_a_smoke_run_has_no_verdicts():
    assert set(verdicts(invented(), meaningful=False).values()) == {"no verdict"}


def test_one_adapter_decides_nothing():
    record = invented()
    one = replace(
        record,
        deltas=tuple(d for d in record.deltas if (d.seed, d.rank) == (0, 4)),
        specialists=record.specialists[:1],
    )
    found = verdicts(one)
    assert found["G1"] == found["G4"] == "undecided"
    assert found["G5"] == found["G6"] == "not measured"
    assert likeness_figure(one) is not None


def test_permuted_specialists_say_how_rare_a_diagonal_is():
    assert permutation_p([np.eye(4).tolist()]) == pytest.approx(1 / 24, abs=0.01)
    assert permutation_p([np.eye(4).tolist()] * 3) < 0.001
    assert permutation_p([np.ones((4, 4)).tolist()]) == 1


def test_equivalence_is_two_one_sided_tests():
    from scipy import stats

    values = [0.01, -0.004, 0.006, 0.002]
    above = stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert equivalence(values, 0.02) == pytest.approx(max(above, below))
    assert equivalence(values, 0.004) > 0.4
    assert np.isnan(equivalence([0.0], 1))


def test_tables_have_an_interval_beside_every_null():
    table = likeness_table(invented())
    assert table.data["cosine_low"].notna().all()
    assert len(table.rows) == 8
    assert specialists_table(invented()).data["cosine_same"].iloc[0] > 0.6
