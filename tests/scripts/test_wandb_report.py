"""The report for W&B, by its specification: which figures and tables of which runs it shows."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import wandb_report
from helpers.world import World

from steerlora.reporting.run_figures import figures_of
from steerlora.reporting.wandb_tables import tables_of


@pytest.fixture(scope="module")
def grids(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """{heading: the grid of panels below it}."""
    pytest.importorskip("wandb_workspaces", reason="the extra: sweeps")
    file = tmp_path_factory.mktemp("report") / "report.json"
    assert wandb_report.main(["--group", "micro", "--write", str(file)]) == 0
    blocks = json.loads(file.read_text())["blocks"]
    found, heading = {}, ""
    for block in blocks:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            found[heading] = block["metadata"]
    return found


def panels(grid: dict[str, Any]) -> list[dict[str, Any]]:
    return grid["panelBankSectionConfig"]["panels"]


def test_it_has_its_three_parts_each_of_the_runs_of_one_stage(grids):
    stages = {
        "Drops by intervention": "causal_ablation",
        "Forgetting": "sequential_forgetting",
        "Runs": None,
    }
    assert [*grids] == [*stages]
    for heading, stage in stages.items():
        (runs,) = grids[heading]["runSets"]
        filters = json.dumps(runs["filters"])
        assert "micro" in filters
        assert "experiment" in filters
        assert stage is None or stage in filters


def test_drops_are_figures_of_an_ablation_with_their_intervals_by_seed(grids):
    figures = figures_of("causal_ablation", {}, World().ablation(0))
    measured = {name.split("/")[1] for name in figures if name.startswith("drop_pct/")}
    drawn = {}
    for panel in panels(grids["Drops by intervention"]):
        if panel["viewType"] == "Bar Chart":
            config = panel["config"]
            assert config["groupBy"] == "seed.value"
            drawn[config["chartTitle"]] = [
                name.removeprefix("summary_metrics.") for name in config["metrics"]
            ]
    assert measured <= {*drawn}
    assert {*drawn} == {*wandb_report.interventions()}
    for name, metrics in drawn.items():
        assert metrics == [f"drop_pct/{name}_low", f"drop_pct/{name}", f"drop_pct/{name}_high"]
    for name in measured:
        assert figures[f"drop_pct/{name}"].interval


def test_its_tables_are_those_that_runs_have(grids):
    world = World()
    for heading, record in (
        ("Drops by intervention", world.ablation(0)),
        ("Forgetting", world.sequential("lora", "broad_first", 0)),
    ):
        (table,) = tables_of(record)
        assert table in json.dumps(panels(grids[heading]))


def test_the_table_of_runs_shows_figures_that_stages_have(grids):
    world = World()
    records = {
        "evaluate": world.evaluation("micro_m", "sc_lora", 0),
        "sequential_forgetting": world.general(world.sequential("lora", "broad_first", 0)),
    }
    known = {name for stage, one in records.items() for name in figures_of(stage, {}, one)}
    shown = [name for name in wandb_report.COLUMNS if name.startswith("summary:")]
    assert {name.removeprefix("summary:") for name in shown} <= known
    (runs,) = grids["Runs"]["runSets"]
    assert set(wandb_report.COLUMNS) <= set(runs["runFeed"]["columnVisible"])


def test_without_the_library_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    file = tmp_path / "report.json"
    assert wandb_report.main(["--group", "micro", "--write", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: a report needs pip install 'steerlora[sweeps]'"
    assert not file.exists()
