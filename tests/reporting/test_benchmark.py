"""The table of the continual benchmark."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.world import METHODS, World

from steerlora.evaluation.forgetting import forgetting_metrics
from steerlora.reporting.benchmark import benchmark_table
from steerlora.reporting.orders import forgetting_table
from steerlora.reporting.published_figures import LONG, STANDARD, published

TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
MATRIX = [
    [0.2, 0.2, 0.1, 0.3],
    [0.9, 0.2, 0.1, 0.3],
    [0.8, 0.6, 0.2, 0.3],
    [0.7, 0.5, 0.7, 0.4],
    [0.6, 0.6, 0.6, 0.8],
]


def record(method: str = "lora", seed: int = 0, shift: float = 0.0, **changes):
    """A sequence on the standard tasks; written answers score half as much."""
    plain = World().sequential("lora", "broad_first", seed)
    matrix = (np.array(MATRIX) + shift).tolist()
    return replace(
        plain,
        method=method,
        order="listed_1",
        sequence=TASKS,
        domains=TASKS,
        broad=None,
        matrix=matrix,
        stderr=np.full((5, 4), 0.01).tolist(),
        metrics=forgetting_metrics(matrix),
        **{"written": (np.array(matrix) / 2).tolist()} | changes,
    )


def row(table, method: str):
    return table.data.set_index("method").loc[method]


def test_the_figures_are_those_of_the_field_in_points():
    table = benchmark_table([record()], METHODS, meaningful=True)
    found = row(table, "lora")
    assert found["AP"] == pytest.approx(65)
    assert found["BWT"] == pytest.approx(100 * (-0.3 + 0.0 - 0.1) / 3)
    assert found["FT"] == pytest.approx(100 * (0.3 + 0.0 + 0.1) / 3)
    assert found["FWT"] == pytest.approx(100 * (0.0 + 0.1 + 0.1) / 3)
    assert found["just trained"] == pytest.approx(75)
    assert found["AP written"] == pytest.approx(32.5)
    assert found["BWT written"] == pytest.approx(found["BWT"] / 2)


def test_published_figures_stand_in_a_column_of_their_own_with_model_and_source():
    table = benchmark_table([record(), record("o_lora")], METHODS, meaningful=True)
    assert table.columns[-1].startswith("Published")
    by_method = {cells[2].text: cells[-1].text for cells in table.rows}
    (o_lora,) = (text for method, text in by_method.items() if "o_lora" in method.lower())
    assert "59.4 / −7.9 (Qwen3-0.6B; arXiv 2601.03938" in o_lora
    assert "72.9" in by_method["FOREVER (2 % replay)"]
    others = [cells for cells in table.rows if cells[2].text == "FOREVER (2 % replay)"]
    assert all(cell.text == "–" for cell in [*others[0][:2], *others[0][3:-1]])
    assert "no comparison" in table.notes[0]


def test_of_other_tasks_nothing_is_published():
    names = ("a", "b", "c", "d")
    other = replace(record(), sequence=names, domains=names)
    table = benchmark_table([other], METHODS, meaningful=True)
    assert len(table.columns) == len(table.rows[0])
    assert not any("Published" in heading for heading in table.columns)


def test_orders_are_shown_apart_and_together_over_replicates():
    records = [record(seed=seed, shift=0.02 * seed) for seed in (0, 1)]
    records += [replace(one, order="listed_2") for one in records]
    data = benchmark_table(records, METHODS, meaningful=True).data
    assert list(data.order) == ["all orders", "listed_1", "listed_2"]
    assert data.runs.tolist() == [4, 2, 2]
    assert data.AP[0] == pytest.approx(66)
    assert data.AP_stderr[0] == pytest.approx(1)


def test_without_written_answers_there_is_no_such_table():
    assert benchmark_table([record(written=[])], METHODS, meaningful=True) is None


def test_where_no_domain_is_broad_orders_have_no_classes():
    table = forgetting_table([record()], METHODS, meaningful=True)
    assert set(table.data[table.data.part == "class"].order) == {"all"}


def test_published_tasks_are_the_benchmarks():
    assert len(STANDARD) == 4
    assert len(LONG) == 15
    assert "EPI" in published(LONG)
    assert published(frozenset({"law"})) == {}
