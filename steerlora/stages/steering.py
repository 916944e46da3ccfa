"""Stage ``steering``: concepts steered by what labelled texts say of latents, beside its rivals.

Labelled texts choose a latent or a direction for each concept, some prompts how far it is pushed;
the figures are of other texts and of other prompts. Every way to steer tries as many strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steerlora.config import Config, LoggerConfig, TrainerConfig
from steerlora.config.checks import one_of
from steerlora.data.domains.micro.concepts import (
    CONCEPTS,
)
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.evaluation.records import SCHEMA, read_record, write_record
from steerlora.evaluation.steering import (
    SteeringRecord,
)
from steerlora.methods.config import METHODS, MethodConfig
from steerlora.reporting.report import Report
from steerlora.reporting.steering.report import write_steering
from steerlora.stages import base, sae_training
from steerlora.stages.common import NOT_IDENTITY, WHERE, replicate, run_log
from steerlora.stages.steering_ways import LEARNT, WAYS, Bench

RESULT = "steering.json"


@dataclass(frozen=True, kw_only=True)
class SteeringSettings:
    """What the figures of one way depend on."""

    way: str
    """Of `WAYS`."""
    condition: str
    """What an experiment calls it."""
    concepts: tuple[str, ...]
    texts: int
    """Labelled texts of a concept: half choose, the others tell."""
    prompts: int
    """Of a concept: half choose the strength, the others tell."""
    factors: tuple[float, ...]
    """Strengths that are tried, in mean lengths of a token's stream; of a trained method, in its
    update's own."""
    support: int
    """Texts that a concept needs at least."""
    least_output_score: float
    """Latents below it are not chosen, where the way has a filter."""
    latents: MethodConfig
    """Steers along latents."""
    vector: MethodConfig
    """Steers along a vector."""
    trained: MethodConfig | None
    """The rival that is trained for each concept."""
    trainer: TrainerConfig
    """How."""
    model: str
    seed: int
    """Of texts, prompts, draws and controls."""
    accelerator: str
    logger: LoggerConfig


DEFAULTS: dict[str, Any] = {
    "ways": [],
    "concepts": list(CONCEPTS),
    "texts": 144,
    "prompts": 20,
    "factors": [0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5],
    "support": 50,
    "least_output_score": 0.01,
    "vector": "steering_vector",
    "trained": [],
    "saes": {},
}


def steps(config: Config, variant: Callable[..., Config]) -> tuple[Step, ...]:
    """One step a way and replicate; in ``saes``, of the way that latents alone decide."""
    given = _checked(config)
    if config.study.stage and len(config.study.seeds) > 1 and "adapter" not in config.study.vary:
        raise UserError(
            f"study.vary={config.study.vary}: stage=steering tells replicates apart by the "
            "adapter's seed: add adapter"
        )
    found = []
    for seed in config.study.seeds if config.study.stage else [config.seed]:
        own = replicate(config, seed) if config.study.stage else []
        for way in given["ways"]:
            found.append(_step(variant, own, given, way, way))
        for name, overrides in given["saes"].items():
            found.append(_step(variant, [*own, *overrides], given, "interpretable", name))
    return tuple(found)


def _checked(config: Config) -> dict[str, Any]:
    given = DEFAULTS | {"ways": list(WAYS)} | config.stage.settings
    given["saes"] = given["saes"] or {}  # null takes an experiment's away
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise UserError(
            f"stage.settings.{unknown[0]}: stage=steering has {', '.join(DEFAULTS)} alone"
        )
    for key, names in (("ways", WAYS), ("concepts", CONCEPTS)):
        for name in given[key]:
            one_of(f"stage.settings.{key}", name, tuple(names))
    for key, least in (("texts", 4), ("prompts", 2), ("support", 1)):
        if type(given[key]) is not int or given[key] < least:
            raise UserError(f"stage.settings.{key}={given[key]}: a whole number from {least}")
    for key in ("concepts", "factors"):
        if len(given[key]) < 2:
            raise UserError(f"stage.settings.{key}={given[key]}: give two or more")
    if not all(isinstance(f, int | float) and 0 < f < 1e6 for f in given["factors"]):
        raise UserError(f"stage.settings.factors={given['factors']}: numbers above 0")
    if given["texts"] < given["support"]:
        raise UserError(
            f"stage.settings.texts={given['texts']}: every concept has less than the support of "
            f"{given['support']} texts that it needs: give more texts, or stage.settings.support="
        )
    if config.domains.kind != "micro":
        raise UserError(
            f"domains.kind={config.domains.kind}: stage=steering grades answers by the rules of "
            "the micro world: set domains=micro"
        )
    return given


def _step(
    variant: Callable[..., Config],
    overrides: Sequence[str],
    given: dict[str, Any],
    way: str,
    condition: str,
) -> Step:
    config = variant(*overrides)
    method = config.method
    if method.steers_along != "latents":
        able = ", ".join(name for name, kind in METHODS.items() if kind.steers_along)
        raise UserError(
            f"stage=steering steers along latents, which method={method.name} does not: give "
            f"method=<option> of kind {able}"
        )
    vector = variant(*overrides, f"method={given['vector']}").method
    if vector.steers_along != "vector":
        raise UserError(
            f"stage.settings.vector={given['vector']}: this method steers along no vector"
        )
    learnt = variant(*overrides, *given["trained"]) if way == LEARNT else None
    if learnt is not None and not (learnt.method.trains and learnt.method.low_rank):
        raise UserError(
            f"stage.settings.trained={list(given['trained'])}: give overrides that name a method "
            "of low rank, as in [method=lora]"
        )
    settings = SteeringSettings(
        way=way,
        condition=condition,
        latents=method,
        vector=vector,
        trained=learnt and learnt.method,
        trainer=(learnt or config).trainer,
        model=config.model.name,
        seed=config.seed,
        accelerator=config.trainer.accelerator,
        logger=config.logger,
        **{
            name: tuple(value) if isinstance(value, list | tuple) else value
            for name, value in given.items()
            if name not in ("ways", "vector", "trained", "saes")
        },
    )
    (sae,) = sae_training.steps(config)
    label = f"steering {config.model.name} {condition} seed {config.seed}"
    return Step(
        "steering",
        settings,
        base.inputs(config) | {"sae": sae},
        label,
        cost=20,
        skip=frozenset() if learnt else frozenset({"trainer"}),
    )


def report(config: Config, artifacts: list[Artifact], provenance: dict[str, Any]) -> Report:
    """Claims, tables and a figure of an experiment's ways."""
    records = [read_record(artifact / RESULT, SteeringRecord) for artifact in artifacts]
    return write_steering(config, records, provenance)


@stage(
    "steering",
    f"1.{SCHEMA}",
    steps=steps,
    report=report,
    skip=WHERE | NOT_IDENTITY,
)
def build(context: Context) -> dict:
    settings: SteeringSettings = context.config
    bench = Bench(context)
    _ = bench.judge  # before anything is attached
    aims, found = WAYS[settings.way](bench), []
    with context.progress.task(context.label, len(aims), unit="concept") as task:
        for number, (concept, aim) in enumerate(zip(settings.concepts, aims, strict=True)):
            found.append(bench.steered(number, concept, aim))
            task.advance(note=concept)
    record = SteeringRecord(
        model=settings.model,
        method=settings.latents.name,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        way=settings.condition,
        concepts=tuple(found),
        texts=settings.texts,
        l0=next((bench.data.l0[aim.sae] for aim in aims if aim.sae), None),
    )
    write_record(context.directory / RESULT, record)
    figures = {"score": record.score, **{part: record.grade(part) for part in found[0].grades}}
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures
