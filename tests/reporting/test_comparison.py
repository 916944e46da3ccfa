"""Two results folders agree, or what does not is found, by invented results and by real ones."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from steerlora.errors import UserError
from steerlora.reporting.comparison import (
    Comparison,
    Pair,
    Reading,
    compare,
    comparison_terminal,
    write_comparison,
)

RESULTS = Path(__file__).parents[2] / "results"


def t_reading(values: list[float]) -> Reading:
    """Mean and Student's interval of replicates."""
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    return Reading(float(np.mean(values)), float(low), float(high), len(values))


@pytest.mark.parametrize("counts", [(2, 2), (3, 5), (8, 3), (20, 20)])
def test_a_pair_is_compatible_where_welchs_test_finds_no_difference(counts):
    rng = np.random.default_rng(sum(counts))
    outcomes = set()
    for shift in np.linspace(0, 12, 25):
        first = rng.normal(0, 1, counts[0])
        second = rng.normal(shift, 0.5, counts[1])
        pair = Pair("x", t_reading(first.tolist()), t_reading(second.tolist()))
        test = stats.ttest_ind(first, second, equal_var=False)  # from the values themselves
        assert pair.p_value == pytest.approx(test.pvalue)
        # In words: the difference against the quantile times the root of the summed squares.
        errors = [stats.sem(values) ** 2 for values in (first, second)]
        parts = (e**2 / (n - 1) for e, n in zip(errors, counts, strict=True))
        reach = stats.t.ppf(0.975, sum(errors) ** 2 / sum(parts)) * math.sqrt(sum(errors))
        assert pair.compatible == (abs(first.mean() - second.mean()) <= reach)
        outcomes.add(pair.compatible)
    assert outcomes == {True, False}


UNKNOWN = {
    "no bounds": Reading(1.0, math.nan, math.nan, 2),
    "one replicate": Reading(1.0, 0.5, 1.5, 1),
    "replicates that all gave one number": Reading(1.0, 1.0, 1.0, 2),
    "but for rounding": Reading(1.0, 1.0, 1.0 + 1e-15, 2),
    "no value": Reading(math.nan, math.nan, math.nan, 3),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_without_an_interval_a_pair_is_neither(kind):
    known = t_reading([5.0, 5.1, 5.2])
    for pair in (Pair("x", UNKNOWN[kind], known), Pair("x", known, UNKNOWN[kind])):
        assert pair.compatible is None
        assert math.isnan(pair.p_value)


def measure(label: str, value: float, half: float | None, seeds: int = 3) -> dict:
    low, high = (None, None) if half is None else (value - half, value + half)
    numbers = {"value": value, "low": low, "high": high, "seeds": seeds, "items": 200}
    return {"label": label, **numbers}


def write(folder: Path, claims: dict[str, tuple[str, list[dict]]], **tables: str) -> Path:
    """A results folder: {id: (verdict, measures)}, and CSV files."""
    folder.mkdir()
    listed = [{"id": id, "verdict": v, "measures": m} for id, (v, m) in claims.items()]
    document = {"name": "x", "meaningful": True, "claims": listed}
    (folder / "claims.json").write_text(json.dumps(document))
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def compared(tmp_path: Path, first: dict, second: dict) -> Comparison:
    return compare(write(tmp_path / "a", first), write(tmp_path / "b", second))


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("in range", "in range", "agree"),
        ("not reproduced", "not reproduced", "agree"),
        ("in range", "direction reproduced", "differ"),
        ("not reproduced", "direction reproduced", "differ"),
        ("in range", "undecided", "undecided"),
        ("undecided (2 replicates)", "not reproduced", "undecided"),
        ("not measured", "not reproduced", "undecided"),
        ("undecided", "undecided", "undecided"),
    ],
)
def test_verdicts_agree_differ_or_are_undecided(tmp_path, first, second, outcome):
    measures = [measure("m", 0.1, 0.05)]
    found = compared(tmp_path, {"C1": (first, measures)}, {"C1": (second, measures)})
    assert found.claims[0].outcome == outcome
    assert found.differences == (
        [f"C1: {first} in the first, {second} in the second"] if outcome == "differ" else []
    )
    assert f"1 {outcome}" in found.summary


def test_verdicts_about_other_measures_are_not_compared(tmp_path):
    small, large = measure("small", 0.1, 0.05), measure("large", 0.2, 0.05)
    first = {"C1": ("not reproduced", [small, large]), "C2": ("in range", [small])}
    second = {"C1": ("in range", [small]), "C3": ("in range", [small])}
    found = compared(tmp_path, first, second)
    (claim,) = found.claims
    assert claim.outcome == "other measures"
    assert claim.missing == ("large",)
    assert [pair.name for pair in claim.measures] == ["small"]
    assert found.differences == []


def test_an_interval_far_off_is_a_difference_and_one_without_bounds_is_not(tmp_path):
    first = [measure("near", 0.1, 0.05), measure("far", 0.1, 0.05), measure("bare", 0.1, None)]
    second = [measure("near", 0.12, 0.05), measure("far", 0.9, 0.05), measure("bare", 0.9, 0.05)]
    found = compared(tmp_path, {"C4": ("in range", first)}, {"C4": ("in range", second)})
    assert [pair.compatible for pair in found.claims[0].measures] == [True, False, None]
    (line,) = found.differences
    assert line == "C4, far: 0.100 [0.050, 0.150] and 0.900 [0.850, 0.950] do not fit"
    assert "The results do not agree" in found.summary
    assert "1 of 2 pairs are compatible and 1 are not known" in found.summary


def test_results_without_a_measure_in_common_are_refused(tmp_path):
    with pytest.raises(UserError, match="no measure of a claim in common"):
        compared(
            tmp_path,
            {"C1": ("in range", [measure("a", 0.1, 0.1)])},
            {"C1": ("in range", [measure("b", 0.1, 0.1)])},
        )
    with pytest.raises(UserError, match=r"claims\.json is missing"):
        compare(tmp_path / "a", tmp_path)


TABLE = """model,seeds,score,score_stderr,gain,gain_low,gain_high,drop_percent,drop_low,drop_high,p
m,3,0.5,0.01,0.1,0.05,0.15,20,15,25,0.5
n,1,0.5,0.01,0.1,,,,,,
"""


def test_cells_are_found_by_row_and_column_and_read_with_their_errors(tmp_path):
    claims = {"C1": ("in range", [measure("m", 0.1, 0.05)])}
    other = "\n".join(reversed(TABLE.strip().splitlines()[1:]))  # rows in another order
    first = write(tmp_path / "a", claims, scale=TABLE, gone=TABLE)
    second = write(tmp_path / "b", claims, scale=f"{TABLE.splitlines()[0]}\n{other}\n")
    (table,) = compare(first, second).tables
    names = [cell.name for cell in table.cells]
    assert names == ["m, score", "m, gain", "m, drop_percent", "n, score", "n, gain"]
    score, gain, drop, single, bare = (cell.first for cell in table.cells)
    assert score.error == pytest.approx(0.01)
    assert (score.high - score.low) / 2 == pytest.approx(0.01 * stats.t.ppf(0.975, 2))
    assert gain == Reading(0.1, 0.05, 0.15, 3)
    assert drop == Reading(20, 15, 25, 3)
    assert math.isnan(single.error)
    assert math.isnan(bare.error)
    assert [cell.compatible for cell in table.cells] == [True, True, True, None, None]


def test_of_a_tables_cells_only_what_chance_does_not_explain_counts(tmp_path):
    claims = {"C1": ("in range", [measure("m", 0.1, 0.05)])}
    rng = np.random.default_rng(0)

    def table(shift: float) -> str:
        values = rng.normal(0, 1, (200, 6))
        values[7] += shift
        data = pd.DataFrame({"model": [f"m{i}" for i in range(200)], "seeds": 6})
        data["score"] = values.mean(axis=1)
        data["score_stderr"] = stats.sem(values, axis=1)
        return data.to_csv(index=False)

    first = write(tmp_path / "a", claims, scale=table(0))
    second = write(tmp_path / "b", claims, scale=table(0))
    chance = compare(first, second)
    assert 2 <= len(chance.tables[0].apart) <= 20  # one in twenty of 200
    assert chance.differences == []
    (second / "scale.csv").write_text(table(20))
    (line,) = compare(first, second).differences
    assert line.startswith("scale.csv, m7, score: ")


def test_what_is_written_and_shown(tmp_path):
    measures = [measure("near", 0.1, 0.05), measure("bare", 0.1, None)]
    far = [measure("near", 0.9, 0.05), measure("bare", 0.2, None)]
    first = write(tmp_path / "a", {"C1": ("in range", measures)}, scale=TABLE)
    second = write(
        tmp_path / "b",
        {"C1": ("not reproduced", far)},
        scale=TABLE.replace("m,3,0.5,", "m,3,0.9,"),
    )
    machine = {"processor": "EPYC", "instructions": "AVX2", "limits": []}
    mixed = [{"machine": machine, "artifacts": ["a"]}, {"machine": None, "artifacts": ["b"]}]
    (second / "provenance.json").write_text(json.dumps({"built_by": mixed}))
    found = compare(first, second)
    assert found.machines == ("unknown", "AVX2, EPYC; unknown")
    files = write_comparison(found, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["comparison.md", "comparison.json"]
    text, document = files[0].read_text(), json.loads(files[1].read_text())
    assert "built by AVX2, EPYC; unknown" in text
    row = "| C1 | near | 0.100 [0.050, 0.150] | 0.900 [0.850, 0.950] | no | "
    assert row + "in range / not reproduced: differ |" in text
    assert "|  | bare | 0.100 | 0.200 | no interval |  |" in text
    assert "1 of 3 pairs of cells are not compatible" in text
    assert "| scale | m, score |" in text
    assert document["agree"] is False
    assert len(document["differences"]) == 3
    (claim,) = document["claims"]
    assert claim["verdicts"] == {"first": "in range", "second": "not reproduced"}
    assert claim["outcome"] == "differ"
    near, bare = claim["measures"]
    assert near["first"] == {
        "value": 0.1,
        "low": 0.05,
        "high": pytest.approx(0.15),
        "replicates": 3,
    }
    assert (near["compatible"], bare["compatible"]) == (False, None)
    assert bare["first"]["low"] is None
    assert document["tables"]["scale"][0]["label"] == "m, score"
    console = Console(width=150, record=True, file=(tmp_path / "log").open("w"))
    console.print(comparison_terminal(found))
    shown = console.export_text()
    assert "no interval" in shown
    assert "in range / not reproduced: differ" in shown


def test_results_of_the_project_agree_with_themselves_until_a_cell_is_moved(tmp_path):
    first, second = RESULTS / "micro", tmp_path / "micro"
    shutil.copytree(first, second)
    same = compare(first, second)
    assert same.differences == []
    assert len(same.claims) == 8
    assert {table.name for table in same.tables} >= {"scale", "ablation", "forgetting"}
    for table in same.tables:
        known = [cell for cell in table.cells if cell.compatible is not None]
        assert known, table.name
        assert all(cell.compatible for cell in known)
    data = pd.read_csv(second / "forgetting.csv")
    data.loc[0, "final_average"] += 10
    data.to_csv(second / "forgetting.csv", index=False)
    (line,) = compare(first, second).differences
    assert line.startswith("forgetting.csv, ")
    assert ", final_average: " in line
