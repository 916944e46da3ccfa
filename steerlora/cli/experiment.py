"""An experiment: the steps that it compares, and the report on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from steerlora.cli.compose import Compose
from steerlora.config import Config, StudyConfig
from steerlora.config.run import PARTS
from steerlora.engine import code, machine
from steerlora.engine.artifacts import Artifact
from steerlora.engine.run import RunReport
from steerlora.engine.steps import Step
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
from steerlora.reporting.runs import open_run
from steerlora.reporting.settings import flat
from steerlora.stages import causal_ablation, evaluate, sequential_forgetting


class Planned(NamedTuple):
    """A step whose record the report is made from."""

    step: Step
    """Builds the record."""

    replicate: int
    """Seed of the replicate that it belongs to."""


@dataclass(frozen=True)
class Plan:
    """The steps whose records an experiment's report is made from."""

    evaluations: tuple[Planned, ...]
    """Evaluations of base models and of trained adapters."""

    ablations: tuple[Planned, ...]
    """Causal ablations, one for each replicate."""

    sequentials: tuple[Planned, ...]
    """Sequences, one for each method, order and replicate."""

    @property
    def steps(self) -> tuple[Step, ...]:
        planned = (*self.evaluations, *self.ablations, *self.sequentials)
        return tuple(one.step for one in planned)


def plan(config: Config, compose: Compose) -> Plan:
    """Every step of the experiment in ``config.study``.

    Args:
        config: the experiment.
        compose: gives this experiment's configuration with some options changed.

    Raises:
        UserError: the study names an option that does not exist, or that does not fit the others.
    """
    study = config.study
    ablated = (study.main_model, f"method={study.ablation_method}")
    evaluations, ablations, sequentials = [], [], []

    def of_replicate(seed: int, model: str, *options: str) -> Config:
        own = _replicate(compose(f"model={model}"), seed)
        return compose(f"model={model}", *options, *own)

    for model in study.models:
        main, scored = model == study.main_model, set()
        for seed in study.seeds if main else study.scale_seeds:
            base = evaluate.step(of_replicate(seed, model), adapted=False)
            if base.fingerprint not in scored:  # one base may serve all replicates
                evaluations.append(Planned(base, seed))
                scored.add(base.fingerprint)
            for method in study.methods if main else study.scale_methods:
                chosen = of_replicate(seed, model, f"method={method}")
                evaluations.append(Planned(evaluate.step(chosen), seed))
    for seed in study.seeds:
        for name in study.retrained:
            under = (f"intervention={name}", "intervention.phase=training")
            chosen = of_replicate(seed, *ablated, *under)
            evaluations.append(Planned(evaluate.step(chosen), seed))
        if study.interventions:
            chosen = of_replicate(seed, *ablated)
            ablations.append(Planned(causal_ablation.step(chosen), seed))
        for method, order in product(study.sequential_methods, study.orders):
            chosen = of_replicate(seed, study.main_model, f"method={method}", *_order(order))
            sequentials.append(Planned(sequential_forgetting.step(chosen), seed))
    return Plan(tuple(evaluations), tuple(ablations), tuple(sequentials))


def _replicate(config: Config, seed: int) -> list[str]:
    """Overrides for a replicate: what varies has its seed, the rest that of the first."""
    keys = dict(zip(PARTS, ("model.seed", "sae.seed", "seed"), strict=True))
    first, own = config.study.seeds[0], varied(config)
    return [f"{key}={seed if part in own else first}" for part, key in keys.items()]


def varied(config: Config) -> list[str]:
    """What every replicate has of its own; a base or SAEs that are given are the same in all."""
    given = {"base": config.model.path, "sae": config.sae.path}
    return [part for part in PARTS if part in config.study.vary and not given.get(part)]


def _order(name: str) -> list[str]:
    """Overrides for an order: ``random_3`` is the random order of seed 3, ``permutation_17`` the
    seventeenth of all."""
    kind, _, number = name.rpartition("_")
    key = {"random": "seed", "permutation": "index"}.get(kind)
    return [f"order={kind}", f"order.{key}={number}"] if key else [f"order={name}"]


def report(config: Config, planned: Plan, run: RunReport) -> Report:
    """Write tables, figures, claims and provenance of a finished experiment."""

    def records(planned: tuple[Planned, ...], name: str, kind: type[Record]) -> list[Record]:
        return [
            replace(read_record(run[step] / name, kind), seed=replicate)
            for step, replicate in planned
        ]

    study, directory = config.study, Path(config.results.dir)
    given = {
        "evaluations": records(planned.evaluations, evaluate.SCORES, Evaluation),
        "ablations": records(planned.ablations, causal_ablation.RESULT, Ablation),
        "sequentials": records(planned.sequentials, sequential_forgetting.RESULT, DomainSequence),
        "methods": methods(study),
        "name": study.name,
        "meaningful": study.meaningful,
        "provenance": provenance(config, planned, run),
        "main_model": study.main_model,
    }
    calibration = Path(study.calibration) if study.calibration else None
    known = read_studies(calibration) if calibration and calibration.is_file() else None
    try:
        written = write_report(
            directory,
            **given,
            studies=known,
            varied=varied(config),
            least_general=study.least_general,
        )
        tables = dict(written.tables)
        if study.calibrate:
            tables |= write_calibration(directory, **given, sizes=study.calibrate).tables
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
        log.used(run[step] for step in planned.steps)
        for table, frame in tables.items():
            log.table(table, list(frame.columns), frame.astype(object).values.tolist())
        claims = [[c.id, c.paper, c.ours, c.verdict] for c in written.claims]
        log.table("claims", ["claim", "paper", "ours", "verdict"], claims)
        log.images(file for file in written.files if file.suffix == ".png")
    return written


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


def provenance(config: Config, planned: Plan, run: RunReport) -> dict[str, Any]:
    """Where the numbers come from: configuration, artifacts and their times, machines, code."""
    stored: list[Artifact] = sorted(run.artifacts.values(), key=lambda a: (a.stage, a.path.name))
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
            for artifact in stored
        ],
        "machine": machine.description(),
        "built_by": machine.builders(artifact.manifest for artifact in stored),
        "commit": code.commit(),
    }
