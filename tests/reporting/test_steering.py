"""The report on steering: effects, claims and verdicts, from invented records."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from steerlora.evaluation.steering import SteeredConcept, SteeringRecord
from steerlora.reporting.steering.claims import slope, steering_claims
from steerlora.reporting.steering.report import concepts_table, ways_table, write_steering
from steerlora.reporting.steering.study import Study
from steerlora.reporting.verdicts import (
    DIRECTION,
    NO_VERDICT,
    NOT_MEASURED,
    NOT_REPRODUCED,
    PARTLY,
    UNDECIDED,
)

CONCEPTS, PROMPTS = 12, 40
TRUE = {
    **{"latents": 0.72, "interpretable": 0.62, "lora": 0.66, "axbench_sae": 0.2},
    **{"difference_of_means": 0.3, "probe": 0.32, "reft_r1": 0.4, "random_latent": 0.1},
    **{"permuted_labels": 0.12, "untrained_sae": 0.15, "random_direction": 0.1},
    **{"l0_4": 0.61, "l0_64": 0.62},
}
"""{way: share of the answers with full marks}: a world in which the paper is right."""
L0 = {"l0_4": 4.0, "l0_64": 64.0, "interpretable": 16.0, "latents": 16.0}


def record(way: str, seed: int, share: float) -> SteeringRecord:
    draws = np.random.default_rng([seed, *way.encode()])
    concepts = []
    for number in range(CONCEPTS):
        grade = (2 * (draws.random(PROMPTS) < share)).astype(int).tolist()
        best = [2] * PROMPTS
        concepts.append(
            SteeredConcept(
                concept=f"c{number}",
                f1=None if way == "lora" else 0.4,
                auroc=None if way == "lora" else 0.8,
                candidate=number,
                searched=[0.0, share],
                factor=0.5,
                grades={"concept": grade, "instruction": best, "fluency": best},
            )
        )
    return SteeringRecord(
        model="micro_m",
        method="steered",
        seed=seed,
        fingerprint=f"{way}-{seed}",
        way=way,
        concepts=tuple(concepts),
        texts=144,
        l0=L0.get(way),
    )


def study(changes=None, seeds=(0, 1, 2, 3, 4)) -> Study:
    shares = TRUE | (changes or {})
    return Study.of(
        [record(way, seed, share) for way, share in shares.items() if share for seed in seeds]
    )


def verdicts(found: Study, **options) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in steering_claims(found, **options)}


def test_a_world_in_which_the_paper_is_right():
    expected = {"V1": DIRECTION, "V2": DIRECTION, "V3": DIRECTION, "V4": DIRECTION}
    assert verdicts(study()) == expected | {"V5": NOT_MEASURED}


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"latents": 0.3}, "V1", NOT_REPRODUCED),
        ({"latents": 0.56}, "V1", NOT_REPRODUCED),
        ({"probe": 0.74}, "V2", NOT_REPRODUCED),
        ({"permuted_labels": 0.62}, "V3", NOT_REPRODUCED),
        ({"l0_4": 0.1}, "V4", NOT_REPRODUCED),
        ({"lora": None}, "V1", NOT_MEASURED),
        ({"probe": None}, "V2", PARTLY),
        ({"l0_4": None}, "V4", NOT_MEASURED),
    ],
)
def test_a_world_in_which_it_is_not(changes, claim, verdict):
    assert verdicts(study(changes))[claim] == verdict


def test_a_smoke_run_or_one_replicate_decides_nothing():
    smoke = verdicts(study(), meaningful=False)
    assert {smoke[c] for c in ("V1", "V2", "V3", "V4")} == {NO_VERDICT}
    one = verdicts(study(seeds=(0,)))
    assert {one[c] for c in ("V1", "V2", "V3", "V4")} == {UNDECIDED}


def test_a_slope_is_over_doublings_of_the_l0():
    places = {"l0_4": 0.1, "interpretable": 0.3, "l0_64": 0.5}
    records = [SimpleNamespace(l0=L0[name], score=score) for name, score in places.items()]
    assert slope(records) == pytest.approx(0.1)


def test_tables_have_a_row_a_way_and_a_row_a_concept():
    found = study(seeds=(0, 1))
    ways, concepts = ways_table(found), concepts_table(found)
    assert list(ways.data.way) == list(TRUE)
    latents = ways.data.set_index("way").loc["latents"]
    scores = [record("latents", seed, TRUE["latents"]).score for seed in (0, 1)]
    assert latents.score == pytest.approx(np.mean(scores))
    assert latents.instruction == 2
    assert np.isnan(ways.data.set_index("way").loc["lora"].f1)
    assert len(concepts.data) == CONCEPTS
    own = [np.mean(record("probe", seed, TRUE["probe"]).concepts[3].scores) for seed in (0, 1)]
    assert concepts.data.set_index("concept").loc["c3", "probe"] == pytest.approx(np.mean(own))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_report_is_written(tmp_path, seeds):
    config = SimpleNamespace(
        study=SimpleNamespace(name="steering", meaningful=True, settings={}, vary=["adapter"]),
        results=SimpleNamespace(dir=str(tmp_path)),
    )
    records = [record(way, seed, share) for way, share in TRUE.items() for seed in seeds]
    written = write_steering(config, records, {"config": {}, "stages": []})
    assert set(dict(written.tables)) == {"ways", "concepts"}
    assert (tmp_path / "steered.png").stat().st_size > 5000
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert len(json.dumps(claims)) > 500
