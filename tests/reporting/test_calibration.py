from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from steerlora.errors import UserError
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import t_interval
from steerlora.reporting.calibration import (
    Calibration,
    choose,
    read_studies,
    write_calibration,
)
from steerlora.reporting.coverage import measured_coverage
from steerlora.reporting.effects import Measure
from steerlora.reporting.labels import BANNER
from steerlora.reporting.quantities import Quantity, quantities
from steerlora.reporting.report import write_report
from steerlora.reporting.stability import verdicts_table
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    NOT_MEASURED,
    NOT_REPRODUCED,
    UNDECIDED,
    Judged,
)

REPLICATES = 8


def noisy(records, world):
    """Records in which every number misses by normal noise of its replicate."""
    generator = np.random.default_rng(0)

    def moved(score):
        by = generator.normal(0, 0.02)
        changed = replace(score, value=score.value + by)
        if isinstance(score, Estimate):
            return changed
        return replace(changed, per_item=[item + by for item in score.per_item])

    evaluations, ablations, sequentials = records
    return {
        "evaluations": [
            replace(
                record,
                averages={name: moved(score) for name, score in record.averages.items()},
                tasks={name: moved(score) for name, score in record.tasks.items()},
            )
            for record in evaluations
        ],
        "ablations": [
            replace(
                record,
                interventions={
                    name: {domain: moved(score) for domain, score in scores.items()}
                    for name, scores in record.interventions.items()
                },
            )
            for record in ablations
        ],
        "sequentials": [
            replace(
                world.general(record),
                matrix=(np.array(record.matrix) + generator.normal(0, 0.02, (6, 5))).tolist(),
            )
            for record in sequentials
        ],
    }


@pytest.fixture(scope="module")
def records(make_world):
    world, seeds = make_world(items=20), range(REPLICATES)
    evaluations = world.evaluations(models=("micro_m",), seeds=seeds)
    invented = (evaluations, world.ablations(seeds), world.sequentials(seeds))
    return noisy(invented, world)


def study(directory, records, methods, *, meaningful=True, sizes=(2, 3, 4)) -> Calibration:
    return write_calibration(
        directory,
        **records,
        methods=methods,
        main_model="micro_m",
        name="demo",
        meaningful=meaningful,
        provenance={"commit": "abc"},
        sizes=sizes,
    )


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, records, methods):
    return study(tmp_path_factory.mktemp("calibration"), records, methods)


def test_a_method_that_is_too_narrow_is_named_as_such(calibration):
    data = calibration.tables["coverage"].set_index(["method", "replicates", "family"])
    for size in (2, 3, 4):
        assert data.covers["percentile bootstrap", size, "all"] == "too narrow"
        assert data.covers["Student's t", size, "all"] == "yes"
        assert "Student's t" in calibration.covers[size]
        assert "percentile bootstrap" not in calibration.covers[size]
        assert data.width["Student's t", size, "all"] == 1
        assert data.covers["sign flips", size, "all"] == "–"  # no interval below six
    # The mean of what is left out has an error of its own.
    assert data.raw["Student's t", 4, "all"] < data.scaled["Student's t", 4, "all"] - 0.03


def test_what_is_written_parses_and_agrees(calibration):
    names = {path.name for path in calibration.directory.iterdir()}
    assert names == {path.name for path in calibration.files}
    assert {
        "coverage.png",
        "coverage.pdf",
        "calibration.md",
        "provenance.json",
        "verdicts.csv",
    } <= names
    document = json.loads((calibration.directory / "calibration.json").read_text())
    assert document["replicates"] == REPLICATES
    assert document["studies"] == {"2": 28, "3": 56, "4": 70}
    assert document["covers"] == {str(k): names for k, names in calibration.covers.items()}
    assert read_studies(calibration.directory / "calibration.json") == calibration.verdicts
    for name, data in calibration.tables.items():
        assert len(pd.read_csv(calibration.directory / f"{name}.csv")) == len(data)
        (calibration.directory / f"{name}.tex").read_text().encode("ascii")
    text = (calibration.directory / "calibration.md").read_text()
    assert f"- 3 replicates: {', '.join(calibration.covers[3])}\n" in text
    assert BANNER not in text


def test_verdicts_are_those_of_reports_on_the_same_replicates(
    tmp_path, calibration, records, methods, monkeypatch
):
    monkeypatch.setattr("steerlora.reporting.report._draw", lambda *_: [])
    counts = {claim.id: {} for claim in report(tmp_path, records, methods, {0, 1}).claims}
    for seeds in combinations(range(REPLICATES), 2):
        for claim in report(tmp_path, records, methods, set(seeds)).claims:
            of = counts[claim.id]
            of[claim.verdict] = of.get(claim.verdict, 0) + 1
    assert {claim: by_size[2] for claim, by_size in calibration.verdicts.items()} == counts


def report(directory, records, methods, seeds, **given):
    parts = {name: [r for r in part if r.seed in seeds] for name, part in records.items()}
    return write_report(
        directory,
        **parts,
        **given,
        methods=methods,
        name="demo",
        meaningful=True,
        provenance={},
        main_model="micro_m",
    )


def test_a_report_shows_what_the_studies_saw(tmp_path, calibration, records, methods, monkeypatch):
    monkeypatch.setattr("steerlora.reporting.report._draw", lambda *_: [])
    report(tmp_path, records, methods, {0, 1, 2}, studies=calibration.verdicts)
    text = (tmp_path / "claims.md").read_text()
    assert text.count("Of 56 studies of 3 replicates, ") == 8


def test_a_smoke_run_is_marked_everywhere(tmp_path, records, methods):
    written = study(tmp_path, records, methods, meaningful=False, sizes=(2,))
    for path in written.files:
        if path.suffix not in (".png", ".pdf") and path.name != "provenance.json":
            assert BANNER in path.read_text().lower(), path.name
    assert {verdict for by in written.verdicts.values() for verdict in by[2]} == {"no verdict"}
    assert "verdicts" not in written.tables


def test_a_base_that_cannot_vary_is_part_of_every_study(tmp_path, records, methods):
    evaluations = [r for r in records["evaluations"] if r.method != "none" or r.seed == 0]
    written = study(tmp_path, records | {"evaluations": evaluations}, methods, sizes=(3,))
    assert all(NOT_MEASURED not in counts[3] for counts in written.verdicts.values())


def test_too_few_replicates(tmp_path, records, methods):
    few = {name: [r for r in part if r.seed < 2] for name, part in records.items()}
    with pytest.raises(UserError, match="at least 3 replicates, and has 2"):
        study(tmp_path, few, methods)


def test_no_studies_to_read(tmp_path):
    (tmp_path / "calibration.json").write_text('{"verdicts": {"C1": 3}}')
    with pytest.raises(UserError, match="no file of a calibration study"):
        read_studies(tmp_path / "calibration.json")


def quantity(numerator, denominator=None, label="x"):
    count = len(numerator)
    errors = (0.01,) * count
    below = None if denominator is None else tuple(denominator)
    measure = Measure(label, tuple(range(count)), tuple(numerator), below, errors, 0, ())
    return Quantity("family", label, measure)


def test_coverage_against_a_slow_count():
    generator = np.random.default_rng(3)
    below = generator.normal(0.8, 0.05, 6)
    ratio = quantity(0.5 * below + generator.normal(0, 0.05, 6), below)
    data = measured_coverage([ratio], {3: choose(6, 3)})
    data = data[data.method == "Student's t"]
    raw, scaled = [], []
    for chosen in combinations(range(6), 3):
        others = [place for place in range(6) if place not in chosen]
        above, under = (np.array(side) for side in ratio.measure[2:4])
        interval = t_interval(above[list(chosen)], under[list(chosen)])
        truth = above[others].mean() / under[others].mean()
        half = interval.high - interval.value
        raw.append(abs(truth - interval.value) <= half)
        scaled.append(abs(truth - interval.value) <= half * np.sqrt(2))
    assert data.raw.tolist() == raw
    assert data.scaled.tolist() == scaled
    assert 0 < sum(raw) < sum(scaled)


def test_sets_of_replicates():
    assert len(choose(8, 3)) == 56
    for size in (4, 5, 6):
        sets = [frozenset(row.tolist()) for row in choose(12, size)]
        assert len(set(sets)) == 200
        assert {len(one) for one in sets} == {size}
        # Each has one without a common replicate to be compared with.
        assert all(any(one.isdisjoint(other) for other in sets) for one in sets[:-1])
    assert len(choose(12, 7)) == 200  # where no two are apart
    counts = np.bincount(choose(12, 4).ravel(), minlength=12)
    assert counts.min() > 40  # no replicate is left aside


def test_verdicts_of_pairs_without_a_common_replicate():
    studies = {2: np.array([[0, 1], [2, 3], [1, 2], [0, 3]])}
    said = [IN_RANGE, DIRECTION, NOT_REPRODUCED, UNDECIDED]
    judged = {2: {
        "C1": [Judged(one, 0.95, 2) for one in said],
        "C2": [Judged(NOT_MEASURED)] * 4,
    }}  # fmt: skip
    data = verdicts_table(judged, studies).data.set_index(["claim", "rule"])
    row = data.loc["C1", True]
    assert [row[one] for one in said] == [0.25] * 4
    # Apart are 01 and 23, which agree, and 12 and 03, of which one decided.
    assert (row.pairs, row.alike, row.otherwise) == (3, pytest.approx(2 / 3), 0)
    assert row.again == row.alike  # where every verdict is what the intervals say
    assert "C2" not in data.index
    assert data.loc["all", True].pairs == 3
    other = {2: {"C1": [Judged(one, 0.5, 2) for one in (IN_RANGE, NOT_REPRODUCED, *said[:2])]}}
    data = verdicts_table(other, studies).data.set_index(["claim", "rule"])
    assert data.loc["C1", True].undecided == 1
    assert np.isnan(data.loc["C1", True].alike)
    unsure = [Judged(IN_RANGE, 0.95, 2), Judged(DIRECTION, 0.5, 2)] * 2
    row = verdicts_table({2: {"C1": unsure}}, studies).data.set_index(["claim", "rule"])
    assert row.loc["C1", True].again == 1 > row.loc["C1", True].alike == 0
    alone = data.loc["C1", False]
    assert (alone.pairs, alone.alike, alone.otherwise) == (4, 0.5, 0.5)
    assert verdicts_table({2: {"C2": [Judged(NOT_MEASURED)] * 4}}, studies) is None


def test_quantities_are_what_a_report_shows(records, world, methods):
    evaluations = [*records["evaluations"], *(world.retrained("shuffle", s, 0.5) for s in (0, 1))]
    ablations = [world.doses(world.ablation(seed)) for seed in (0, 1)]
    found = quantities(
        evaluations, ablations, records["sequentials"], methods, main_model="micro_m"
    )
    by_family = {}
    for one in found:
        by_family.setdefault(one.family, []).append(one.label)
    assert {family: len(labels) for family, labels in by_family.items()} == {
        "score": 4 * (5 + 5),  # methods by groups and domains
        "gain": 3 * 5,
        "drop": 9 * (1 + 5) + 8 * 3 + 1 + 1,  # domains, doses, C5's advantage, a retrained control
        "forgetting": 2 * 3,  # methods by classes of orders
        "final average": 2 * 3,
        "general kept": 2 * 3,
        "reduction": 3,
        "order effect": 2,
        "ratio": 1,
        "usage entropy": 1,
    }
    assert len({(one.family, one.label) for one in found}) == len(found)
