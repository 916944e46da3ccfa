"""Sparse units through the stages by configuration alone: trained, scored, in sequence, planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.experiments import TINY

from steerlora.__main__ import main


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


def test_it_has_a_plan_which_counts_what_lora_of_as_many_ranks_has(capsys):
    def line(*overrides: str) -> str:
        main([*TINY, "stage=plan", *overrides])
        printed = capsys.readouterr().out
        assert "peak" in printed
        return next(line for line in printed.splitlines() if "which trains" in line)

    stan, lora = line("method=stan"), line("method=lora")
    assert stan.replace("stan", "lora") == lora
