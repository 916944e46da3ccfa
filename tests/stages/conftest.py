"""The smoke experiment, run once in this process and shared by the tests of the path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from steerlora.cli import compose, experiment
from steerlora.config import Config
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import RunReport, run
from steerlora.reporting.report import Report

TINY = (
    "experiment=smoke",
    "model.steps=3",
    "model.batch_size=8",
    "domains.train_items=20",
    "domains.pretrain_items=100",
    "domains.evaluation_items=6",
    "sae.max_tokens=800",
    "sae.steps=3",
    "sae.batch_size=64",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
    "method.rank=2",
    "evaluation.limit=3",
    "order.steps_per_domain=1",
    "study.interventions=[shuffle,fixed_rank,oracle_domain]",
    "logger=none",
)
"""The smoke experiment, smaller still."""


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
    overrides = (*TINY, f"artifacts.root={root}", f"results.dir={results}")
    config = compose.load(overrides)
    planned = experiment.plan(config, lambda *changes: compose.load([*overrides, *changes]))
    report = run(planned.steps, ArtifactStore(root))
    written = experiment.report(config, planned, report)
    return Study(root, results, overrides, planned, report, written)
