"""The smoke experiment, run once in this process and shared by the tests of the path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.experiments import TINY

from steerlora.cli import compose, experiment
from steerlora.config import Config
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import RunReport, run
from steerlora.reporting.report import Report

OVERRIDES = (*TINY, "method.rank=2", "study.interventions=[shuffle,fixed_rank,oracle_domain]")


@dataclass(frozen=True)
class Study:
    """A finished experiment and what made it."""

    root: Path
    results: Path
    overrides: tuple[str, ...]
    planned: experiment.Plan
    report: RunReport
    written: Report

    def config(self, *changes: str) -> Config:
        """The experiment's configuration with some options changed."""
        return compose.load([*self.overrides, *changes])

    def plan(self, *changes: str) -> experiment.Plan:
        """The experiment's steps with some options changed."""
        return experiment.plan(self.config(*changes), lambda *more: self.config(*changes, *more))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Study:
    root = tmp_path_factory.mktemp("artifacts")
    results = tmp_path_factory.mktemp("results") / "smoke"
    overrides = (*OVERRIDES, f"artifacts.root={root}", f"results.dir={results}")
    config = compose.load(overrides)
    planned = experiment.plan(config, lambda *changes: compose.load([*overrides, *changes]))
    report = run(planned.steps, ArtifactStore(root))
    written = experiment.report(config, planned, report.artifacts)
    return Study(root, results, overrides, planned, report, written)
