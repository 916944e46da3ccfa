"""Sparse units through the stages by configuration alone: trained, scored, in sequence, planned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from helpers.experiments import TINY

from steerlora.__main__ import main
from steerlora.cli import compose
from steerlora.errors import UserError
from steerlora.stages import units

MICRO_XS_LAYERS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stan")


@pytest.fixture
def run(root):
    """``run("evaluate", ...)``: asks for the stage; its one artifact."""

    def run(stage: str, *overrides: str) -> Path:
        before = set((root / stage).glob("*"))
        main([*TINY, f"artifacts.root={root}", f"stage={stage}", "method=stan", *overrides])
        made = {path for path in set((root / stage).glob("*")) - before if path.is_dir()}
        (folder,) = made
        return folder

    return run


def test_it_trains_is_scored_and_goes_through_a_sequence(run):
    scores = json.loads((run("evaluate") / "scores.json").read_text())
    assert scores["method"] == "stan"
    assert len(scores["tasks"]) == 9
    sequence = json.loads((run("sequential_forgetting") / "sequential.json").read_text())
    assert len(sequence["matrix"]) == 6


def test_its_units_are_looked_at(run):
    """Of the joint adapter and of a sequence's last; with controls whose figures are numbers."""
    for training in ("joint", "sequence"):
        chosen = (f"stage.settings.training={training}", "stage.settings.rows=6")
        folder = run("units", *chosen)
        found = json.loads((folder / "units.json").read_text())
        assert all(math.isfinite(value) for value in found["figures"].values())
        assert 0 < found["figures"]["load/alive"] <= 1
        assert len(found["load_by_layer"]) == 7 * (MICRO_XS_LAYERS - 1)
        assert [one["domain"] for one in found["switched_off"]] == list(found["intact"])
        assert any(one["own"] != one["control"] for one in found["switched_off"])
        table = pd.read_csv(folder / "units.csv")
        assert len(table) == 2 * len(found["intact"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("method=lora",), "method=lora has none: give another method="),
        (("stage.settings.rows=3",), "stage.settings.rows=3: a number of rows from 4"),
        (("stage.settings.training=jont",), "did you mean 'joint'"),
        (("stage.settings.row=4",), "stage=units has training and rows alone"),
    ],
)
def test_what_makes_no_units_is_one_line(overrides, says):
    overrides = [f"+{o}" if o.startswith("stage.settings.row=") else o for o in overrides]
    config = compose.load([*TINY, "stage=units", "method=stan", *overrides])
    with pytest.raises(UserError) as caught:
        units.step(config)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


SMALL = (
    *("experiment=stan", *TINY[1:], "model=micro_xs", "study.models=[micro_xs]"),
    *("study.main_model=micro_xs", "study.meaningful=false", "study.seeds=[0]"),
    *("study.methods=[lora,stan]", "study.sequential_methods=[lora,stan]"),
    *("study.settings.rows=6", "study.workers=1"),
)


def test_an_experiment_compares_them_and_writes_claims(root, tmp_path):
    main([*SMALL, f"artifacts.root={root}", f"results.dir={tmp_path}"])
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == [f"U{number}" for number in range(1, 9)]
    assert {claim["verdict"] for claim in claims} == {"no verdict"}
    measured = {claim["id"] for claim in claims if claim["measures"]}
    assert {"U1", "U3"} <= measured
    assert list(pd.read_csv(tmp_path / "scores.csv").method) == ["none", "lora", "stan"]
    assert list(pd.read_csv(tmp_path / "sequences.csv").method) == ["lora", "stan"]
    assert set(pd.read_csv(tmp_path / "units.csv").training) == {"joint", "sequence"}
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("~study.settings.roles.sparse", "study.settings.roles.sparse=<method>"),
        ("++study.settings.roles.spares=stan", "did you mean 'sparse'"),
        ("++study.settings.row=6", "did you mean 'rows'"),
        ("study.settings.rows=2", "stage.settings.rows=2: a number of rows from 4"),
    ],
)
def test_settings_of_an_experiment_that_make_none_are_one_line(override, says):
    config = compose.load([*SMALL, override])
    with pytest.raises(UserError) as caught:
        units.steps(config, lambda *more: compose.load([*SMALL, *more]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learning_rate_of_its_own_is_the_methods_alone():
    overrides = [*SMALL, "++study.settings.learning_rates.stan=0.5"]
    made = units.steps(compose.load(overrides), lambda *more: compose.load([*overrides, *more]))
    rates = {
        step.config.method.name: step.config.trainer.learning_rate
        for one in made
        for step in one.upstream
        if step.stage == "adapter_training"
    }
    assert rates == {"lora": compose.load(SMALL).trainer.learning_rate, "stan": 0.5}


def test_it_has_a_plan_which_counts_what_lora_of_as_many_ranks_has(capsys):
    def line(*overrides: str) -> str:
        main([*TINY, "stage=plan", *overrides])
        printed = capsys.readouterr().out
        assert "peak" in printed
        return next(line for line in printed.splitlines() if "which trains" in line)

    stan, lora = line("method=stan"), line("method=lora")
    assert stan.replace("stan", "lora") == lora
