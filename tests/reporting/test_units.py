"""Claims and tables on sparse units, of invented records in which each holds or fails."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.world import DOMAINS, World

from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.units import SwitchedOff, UnitsRecord
from steerlora.reporting.units.claims import unit_claims
from steerlora.reporting.units.report import (
    forgetting_table,
    scores_table,
    switched_off_figure,
    units_table,
    write_units,
)
from steerlora.reporting.units.study import ROLES, UnitStudy

SEEDS = (0, 1, 2)
PLAYS = {role: role for role in ROLES}
BETTER = dict.fromkeys(ROLES, 0.5) | {"sparse": 0.6, "wide": 0.7}
WORLD = World(forgetting={"lora": 0.4, "sparse": 0.2, "protected": 0.05})


def noise(method: str, seed: int) -> float:
    return float(np.random.default_rng([seed, *method.encode()]).normal(0, 0.0005))


def evaluation(method: str, seed: int, score: float):
    record = WORLD.evaluation("micro_m", method, seed)
    target = Estimate(score + noise(method, seed), 0.01)
    return replace(record, averages=record.averages | {"target": target})


def units(seed: int, training: str = "joint", own: float = 0.6, control: float = 0.1):
    change = noise(training, seed)

    def off(name: str) -> SwitchedOff:
        rises = [
            {d: (rise if d == name else 0.0) + change for d in DOMAINS} for rise in (own, control)
        ]
        return SwitchedOff(domain=name, units=3, own=rises[0], control=rises[1])

    figures = {
        **{"information/mean": 0.2, "information/null": 0.01, "information/above_null": 0.9},
        **{"load/alive": 0.8, "load/cv2": 1.5, "load/largest": 0.3},
        **{"overlap/jaccard": 0.4 + change, "overlap/chance": 0.0526},
        **{"switched_off/own": own + change, "switched_off/control": control},
    }
    return UnitsRecord(
        model="micro_m",
        method="sparse",
        seed=seed,
        fingerprint=f"units-{training}-{seed}",
        training=training,
        figures=figures,
        intact=dict.fromkeys(DOMAINS, 1.0),
        switched_off=tuple(map(off, DOMAINS)),
        load_by_layer={"1:mlp/up_proj": {"alive": 0.8, "cv2": 1.5, "largest": 0.3}},
    )


def study(scores: dict[str, float] = BETTER, **changes) -> UnitStudy:
    made = UnitStudy(
        PLAYS,
        [evaluation(m, s, v) for m, v in {"none": 0.05, **scores}.items() for s in SEEDS],
        [WORLD.sequential(m, "broad_first", s) for m in WORLD.forgetting for s in SEEDS],
        [units(seed, training) for seed in SEEDS for training in ("joint", "sequence")],
    )
    return made._replace(**changes)


def verdicts(made: UnitStudy, **settings) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in unit_claims(made, **settings)}


REPRODUCED = "direction reproduced"


def test_all_that_holds_is_said_to_hold():
    found = verdicts(study(), tuned=True)
    assert found == dict.fromkeys([f"U{n}" for n in range(1, 9)], REPRODUCED) | {
        "U4": "not measured"
    }


def test_what_fails_is_said_to_fail():
    worse = dict.fromkeys(ROLES, 0.6) | {"sparse": 0.5, "wide": 0.4}
    flat = [units(seed, own=0.1, control=0.1 + 1e-4 * seed) for seed in SEEDS]
    found = verdicts(study(worse, units=flat), tuned=True)
    for name in ("U1", "U2", "U3", "U5", "U6", "U7"):
        assert found[name] == "not reproduced", name


def test_learning_rates_that_were_not_tuned_decide_nothing():
    found = verdicts(study())
    assert found["U1"] == found["U2"] == "partly measured"
    first = unit_claims(study())[0]
    assert "Learning rates were not chosen on development text" in first.note


def test_a_claim_of_which_something_is_missing_is_partly_measured():
    fewer = {role: score for role, score in BETTER.items() if role != "frozen"}
    assert verdicts(study(fewer), tuned=True)["U7"] == "partly measured"
    nothing = verdicts(study({}, units=[], sequentials=[]), tuned=True)
    assert set(nothing.values()) == {"not measured"}
    assert set(verdicts(study(), meaningful=False).values()) == {"no verdict"}


def test_effects_are_those_of_the_records():
    made = study()
    effect = made.advantage("x", "sparse", "lora")
    assert effect.seeds == SEEDS
    expected = [0.1 + noise("sparse", s) - noise("lora", s) for s in SEEDS]
    assert effect.numerator == pytest.approx(expected)
    assert made.less_forgetting("sparse", "lora").interval.value == pytest.approx(50, abs=1)
    selectivity = unit_claims(made)[2].measures[0]
    assert selectivity.numerator == pytest.approx([0.5 + noise("joint", s) for s in SEEDS])
    assert made.advantage("x", "sparse", "no such part") is None


def test_notes_say_what_stands_beside_a_claim():
    claims = {claim.id: claim for claim in unit_claims(study())}
    assert "Less LoRA of rank k: +0.100" in claims["U1"].note
    assert "At equal active width, less LoRA: +0." in claims["U1"].note
    assert "With the rows' domains permuted: 0.01" in claims["U3"].note
    assert "protected: 87." in claims["U8"].note
    assert "By chance: 0.0526" in claims["U8"].note


def test_tables_hold_every_record():
    made = study()
    assert list(scores_table(made).data.method) == ["none", *ROLES]
    assert list(forgetting_table(made).data.method) == list(WORLD.forgetting)
    overlap = forgetting_table(made).data.set_index("method").overlap
    assert overlap.notna().tolist() == [False, True, False]
    assert len(units_table(made).data) == 2 * 10
    empty = UnitStudy(PLAYS, [], [], [])
    assert scores_table(empty) is forgetting_table(empty) is units_table(empty) is None
    assert switched_off_figure(empty) is None


def test_the_report_is_written(tmp_path):
    config = SimpleNamespace(
        study=SimpleNamespace(name="sparse", meaningful=True, settings={}, vary=["adapter"]),
        results=SimpleNamespace(dir=str(tmp_path / "results")),
    )
    written = write_units(config, study(), {})
    assert {"scores.md", "sequences.csv", "units.tex", "claims.json", "results.md"} <= {
        path.name for path in (tmp_path / "results").iterdir()
    }
    assert (tmp_path / "results" / "switched_off.png").stat().st_size > 1000
    assert len(written.claims) == 8
