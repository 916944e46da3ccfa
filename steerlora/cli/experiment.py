"""An experiment: the steps that it compares, and the report on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd

from steerlora.cli.compose import Compose
from steerlora.cli.study_models import compared_models, options_of_model
from steerlora.config import Config, StudyConfig
from steerlora.config.run import StageConfig
from steerlora.engine import code, machine
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.lineage import Library
from steerlora.engine.steps import STAGES, Step
from steerlora.errors import UserError
from steerlora.evaluation.records import (
    Ablation,
    DomainSequence,
    Evaluation,
    Record,
    read_record,
)
from steerlora.reporting.calibration import read_studies, write_calibration
from steerlora.reporting.methods import Methods
from steerlora.reporting.report import Report, write_report
from steerlora.reporting.report_page import MissingCell, write_page
from steerlora.reporting.run_rows import row_of
from steerlora.reporting.runs import open_run
from steerlora.reporting.settings import flat
from steerlora.stages import causal_ablation, evaluate, sequential_forgetting
from steerlora.stages.common import SEEDS, varied

NO_METHOD = "method=base"
"""The override that asks for the base alone, which no other option of a method goes with."""


class Planned(NamedTuple):
    """A step whose record the report is made from."""

    step: Step
    """Builds the record."""

    replicate: int
    """Seed of the replicate that it belongs to."""

    options: tuple[str, ...]
    """Overrides that ask for it alone, beside the experiment's."""


@dataclass(frozen=True)
class Plan:
    """The steps whose records an experiment's report is made from."""

    evaluations: tuple[Planned, ...]
    """Evaluations of base models and of trained adapters."""

    ablations: tuple[Planned, ...]
    """Causal ablations, one for each replicate."""

    sequentials: tuple[Planned, ...]
    """Sequences, one for each method, order and replicate."""

    staged: tuple[Planned, ...] = ()
    """What ``study.stage`` asks for; the others are empty then."""

    left_out: tuple[str, ...] = ()
    """Models of the study that are not compared: the main model is one of the user's own."""

    @property
    def all(self) -> tuple[Planned, ...]:
        return (*self.evaluations, *self.ablations, *self.sequentials, *self.staged)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(one.step for one in self.all)


def plan(config: Config, compose: Compose) -> Plan:
    """Every step of the experiment in ``config.study``.

    Args:
        config: the experiment.
        compose: gives this experiment's configuration with some options changed.

    Raises:
        UserError: the study names an option that does not exist, or that does not fit the others.
    """
    study = config.study
    if study.stage:
        return Plan((), (), (), _of_stage(config, compose))
    models = compared_models(config, compose)
    main_model = options_of_model(config, study.main_model)
    ablated = f"method={study.ablation_method}"
    evaluations, ablations, sequentials = [], [], []

    def planned(stage: ModuleType, seed: int, model: Sequence[str], *options: str) -> Planned:
        chosen = (*model, *options, *_replicate(compose(*model), seed))
        name = stage.__name__.rpartition(".")[2]
        return Planned(stage.step(compose(*chosen)), seed, (f"stage={name}", *chosen))

    for name, model in models.items():
        main, scored = name == study.main_model, set()
        for seed in study.seeds if main else study.scale_seeds:
            chosen = (*model, *_replicate(compose(*model), seed))
            base = evaluate.step(compose(*chosen), adapted=False)
            if base.fingerprint not in scored:  # one base may serve all replicates
                evaluations.append(Planned(base, seed, ("stage=evaluate", *chosen, NO_METHOD)))
                scored.add(base.fingerprint)
            for method in study.methods if main else study.scale_methods:
                evaluations.append(planned(evaluate, seed, model, f"method={method}"))
    for seed in study.seeds:
        for name in study.retrained:
            under = (f"intervention={name}", "intervention.phase=training")
            evaluations.append(planned(evaluate, seed, main_model, ablated, *under))
        if study.interventions:
            ablations.append(planned(causal_ablation, seed, main_model, ablated))
        for method, order in product(study.sequential_methods, study.orders):
            chosen = (f"method={method}", *_order(order))
            sequentials.append(planned(sequential_forgetting, seed, main_model, *chosen))
    left_out = tuple(name for name in study.models if name not in models)
    return Plan(tuple(evaluations), tuple(ablations), tuple(sequentials), left_out=left_out)


def _of_stage(config: Config, compose: Compose) -> tuple[Planned, ...]:
    """The steps of an experiment that is about one stage."""
    study = config.study
    STAGES.check("study.stage", study.stage)
    if STAGES[study.stage].report is None:
        able = ", ".join(name for name, stage in STAGES.items() if stage.report)
        raise UserError(f"study.stage={study.stage}: it writes no report; those that do: {able}")
    asked = StageConfig(name=study.stage, settings=study.settings)
    steps = STAGES[study.stage].steps(replace(config, stage=asked), compose)
    return tuple(Planned(step, study.seeds[0], (f"stage={study.stage}",)) for step in steps)


def _replicate(config: Config, seed: int) -> list[str]:
    """Overrides for a replicate: what varies has its seed, the rest that of the first."""
    first, own = config.study.seeds[0], varied(config)
    return [f"{key}={seed if part in own else first}" for part, key in SEEDS.items()]


def _order(name: str) -> list[str]:
    """Overrides for an order: ``random_3`` is the random order of seed 3, ``permutation_17`` the
    seventeenth of all, ``listed_2`` the one that the domains' folder lists as 2."""
    kind, _, number = name.rpartition("_")
    key = {"random": "seed", "permutation": "index", "listed": "listed"}.get(kind)
    return [f"order={kind}", f"order.{key}={number}"] if key else [f"order={name}"]


def stored(planned: Plan, store: ArtifactStore) -> dict[str, Artifact]:
    """Those artifacts of an experiment that are there, whoever built them, by fingerprint: intact
    ones of its steps, and all that they were built from.

    Raises:
        UserError: there are none.
    """
    found = [store.find(step.stage, step.fingerprint) for step in planned.steps]
    there = [artifact for artifact in found if artifact is not None]
    if not there:
        raise UserError(
            f"stage=report: nothing of this experiment is stored under {store.root}: build it "
            "first, with the same command less stage=report, or give artifacts.root=<folder>"
        )
    return {one.fingerprint: one for one in Library(store.root).ancestry(*there)}


def missing(
    planned: Plan, artifacts: Mapping[str, Artifact], overrides: Sequence[str]
) -> list[MissingCell]:
    """The steps that are not stored, each with the command that builds it.

    Args:
        overrides: the user's, which named the experiment.
    """

    def command(options: Sequence[str]) -> str:
        dropped = ("stage", "method") if NO_METHOD in options else ("stage",)
        kept = [text for text in overrides if re.split(r"[.=]", text.lstrip("+"))[0] not in dropped]
        return shlex.join(["steerlora", *kept, *options])

    found = {
        one.step.fingerprint: MissingCell(label=one.step.label, command=command(one.options))
        for one in planned.all
        if one.step.fingerprint not in artifacts
    }
    return list(found.values())


def report(
    config: Config,
    planned: Plan,
    artifacts: Mapping[str, Artifact],
    absent: Sequence[MissingCell] = (),
) -> Report:
    """Write tables, figures, claims, provenance and the page of an experiment.

    Args:
        artifacts: by fingerprint; those of steps, and what they were built from.
        absent: the steps that have none. The report is then of the others.
    """
    study = config.study
    try:
        if study.stage:
            names = [one.step.fingerprint for one in planned.staged]
            found = [artifacts[name] for name in names if name in artifacts]
            written = STAGES[study.stage].report(config, found, provenance(config, artifacts))
            tables = dict(written.tables)
        else:
            written, tables = _comparison(config, planned, artifacts)
        written = with_page(config, written, planned, artifacts, absent)
    except OSError as error:
        raise UserError(
            f"cannot write the report into {config.results.dir} ({error.strerror}): make room or "
            "give results.dir=<folder>; what was built is kept"
        ) from error
    run_log = open_run(
        config.logger,
        job_type="report",
        name=f"report {study.name}",
        config=flat(asdict(config)),
        asked_for=True,
    )
    with run_log as log:
        log.used(
            artifacts[step.fingerprint] for step in planned.steps if step.fingerprint in artifacts
        )
        for table, frame in tables.items():
            log.table(table, list(frame.columns), frame.astype(object).values.tolist())
        claims = [[c.id, c.paper, c.ours, c.verdict] for c in written.claims]
        log.table("claims", ["claim", "paper", "ours", "verdict"], claims)
        log.images(file for file in written.files if file.suffix == ".png")
    return written


def _comparison(
    config: Config, planned: Plan, artifacts: Mapping[str, Artifact]
) -> tuple[Report, dict[str, pd.DataFrame]]:
    """The report on the paper's comparison, and its tables with those of a calibration."""

    def records(planned: tuple[Planned, ...], name: str, kind: type[Record]) -> list[Record]:
        return [
            replace(read_record(artifacts[one.step.fingerprint] / name, kind), seed=one.replicate)
            for one in planned
            if one.step.fingerprint in artifacts
        ]

    study, directory = config.study, Path(config.results.dir)
    given = {
        "evaluations": records(planned.evaluations, evaluate.SCORES, Evaluation),
        "ablations": records(planned.ablations, causal_ablation.RESULT, Ablation),
        "sequentials": records(planned.sequentials, sequential_forgetting.RESULT, DomainSequence),
        "methods": methods(study),
        "name": study.name,
        "meaningful": study.meaningful,
        "provenance": provenance(config, artifacts),
        "main_model": study.main_model,
    }
    calibration = Path(study.calibration) if study.calibration else None
    written = write_report(
        directory,
        **given,
        studies=read_studies(calibration) if calibration and calibration.is_file() else None,
        varied=varied(config),
        least_general=study.least_general,
    )
    tables = dict(written.tables)
    if study.calibrate:
        tables |= write_calibration(directory, **given, sizes=study.calibrate).tables
    return written, tables


def with_page(
    config: Config,
    written: Report,
    planned: Plan,
    artifacts: Mapping[str, Artifact],
    absent: Sequence[MissingCell],
) -> Report:
    """The report with ``report.html``, which is written last: it shows all the rest."""
    replicates = {one.step.fingerprint: one.replicate for one in planned.all}
    library = Library(Path(config.artifacts.root))
    rows = [
        row_of(artifacts[name], library, seed=replicate)
        for name, replicate in replicates.items()
        if name in artifacts
    ]
    path = write_page(
        written,
        name=config.study.name,
        meaningful=config.study.meaningful,
        methods=methods(config.study),
        rows=rows,
        artifacts=list(artifacts.values()),
        missing=absent,
        provenance=(written.directory / "provenance.json").read_text(encoding="utf-8"),
    )
    return replace(written, files=(*written.files, path))


def methods(study: StudyConfig) -> Methods:
    """The parts of an experiment's methods, in the order in which it names them."""
    named = (*study.methods, *study.scale_methods, *study.sequential_methods)
    return Methods(
        paper=study.paper_method,
        baseline=study.baseline_method,
        dense=study.dense_method,
        own=study.own_method,
        variants=study.variants,
        order=tuple(dict.fromkeys(named)),
        colours=study.colours,
    )


def provenance(config: Config, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Where the numbers come from: configuration, artifacts and their times, machines, code."""
    ordered = sorted(artifacts.values(), key=lambda one: (one.stage, one.path.name))
    return {
        "experiment": config.study.name,
        "config": asdict(config),
        "stages": [
            {
                "stage": artifact.stage,
                "fingerprint": artifact.fingerprint,
                "label": artifact.manifest.get("label"),
                "seconds": round(artifact.manifest.get("wall_seconds", 0.0), 1),
                "created": artifact.manifest.get("created"),
            }
            for artifact in ordered
        ],
        "machine": machine.description(),
        "built_by": machine.builders(artifact.manifest for artifact in ordered),
        "commit": code.commit(),
    }
