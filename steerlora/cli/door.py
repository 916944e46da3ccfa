"""The way in from Python: what the command line does, with records in place of printed tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.lineage import Library
from steerlora.engine.run import RunReport
from steerlora.engine.run import run as build
from steerlora.engine.steps import STAGES, Step
from steerlora.errors import UserError
from steerlora.evaluation.records import Ablation, DomainSequence, Evaluation
from steerlora.reporting.run_rows import RunRow, row_of

PRINTED = ("status", "plan", "runs", "compare", "report")
"""What ``stage=`` may be on the command line only, because it prints and stores nothing."""


@dataclass(frozen=True)
class Results:
    """What was asked for: artifacts with their settings, figures and records."""

    rows: tuple[RunRow, ...]
    """One an artifact."""

    @property
    def artifacts(self) -> list[Artifact]:
        """Where things are stored: ``results.artifacts[0] / "scores.json"``."""
        return [row.artifact for row in self.rows]

    @property
    def records(self) -> list[Evaluation | Ablation | DomainSequence]:
        """The typed records, of those stages that write one."""
        return [row.record for row in self.rows if row.record is not None]

    def frame(self) -> pd.DataFrame:
        """A row an artifact: its flat settings (``method.rank``), its figures
        (``average/target``) and their standard errors over items (``average/target_stderr``)."""
        found = []
        for row in self.rows:
            entry = dict(row.settings)
            for name, figure in row.figures.items():
                entry[name] = figure.value
                if figure.stderr is not None:
                    entry[f"{name}_stderr"] = figure.stderr
            found.append(entry)
        return pd.DataFrame(found)


def run(*overrides: str) -> Results:
    """Build what is missing and give what was asked for; prints nothing.

    ``steerlora.run("stage=evaluate", "method=sc_lora").frame()``

    Args:
        overrides: as on the command line; one stage, or an experiment, of which all evaluations,
            ablations and sequences are given, and no report is written.

    Raises:
        UserError: a mistake in the overrides, with the likely fix.
        KeyboardInterrupt: the user's; the same call goes on where it was.
    """
    config = compose.load(overrides)
    steps = _steps(config, overrides)
    finished = build(
        steps,
        ArtifactStore(Path(config.artifacts.root)),
        workers=config.study.workers,
        plugins=config.plugins,
    )
    return results(steps, finished)


def results(steps: Sequence[Step], finished: RunReport) -> Results:
    """The results of steps that are built."""
    artifacts = [finished[step] for step in steps]
    libraries = {one.path.parents[1]: Library(one.path.parents[1]) for one in artifacts}
    return Results(tuple(row_of(one, libraries[one.path.parents[1]]) for one in artifacts))


def _steps(config: Config, overrides: Sequence[str]) -> Sequence[Step]:
    def variant(*changes: str) -> Config:
        return compose.load([*overrides, *changes])

    if config.stage is None:
        if config.study.name == "single":
            raise UserError("nothing to do: give stage=<name>, or experiment=<name>")
        from steerlora.cli import experiment

        return experiment.plan(config, variant).steps
    if config.stage.name in PRINTED:
        raise UserError(f"stage={config.stage.name} prints: it is for the command line")
    STAGES.check("stage.name", config.stage.name)
    return STAGES[config.stage.name].steps(config, variant)
