"""Stage ``splicing``: what a model loses with SAEs in place of streams, and what is won back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steerlora.config import Config, EvaluationConfig, InterventionConfig, LoggerConfig
from steerlora.data.batches import by_length, collate
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError, nearest
from steerlora.evaluation.records import SCHEMA, read_record, write_record
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.scoring import Scorer
from steerlora.evaluation.splicing import WAYS, Cost, Splicing
from steerlora.lm.flops import splicing_flops_per_token
from steerlora.lm.shapes import DecoderShape
from steerlora.methods.base import Method, SiteSAE, Sources
from steerlora.methods.config import METHODS, MethodConfig
from steerlora.methods.saving import load_adapter
from steerlora.reporting.report import Report
from steerlora.reporting.splicing.report import write_splicing
from steerlora.saes.config import SAEConfig
from steerlora.saes.saelens import load_sae
from steerlora.stages import adapter_training, base, sae_training
from steerlora.stages.common import WHERE, load_base, other_general_text, replicate, run_log
from steerlora.stages.splicing_measures import Measurement, running
from steerlora.training.language import Text

RESULT = "splicing.json"
BATCH_SIZE = 32
DEFAULTS = {"rows": 256, "adapters": {}, "saes": {}, "references": {}, "tasks": [], "scored": []}


@dataclass(frozen=True, kw_only=True)
class SplicingSettings:
    """Attributes: condition: what was trained; trained: there is an adapter; rows: of text; tasks:
    that are scored; domains: whose rows SAEs learn from; the others as in the configuration."""

    condition: str
    trained: bool
    rows: int
    tasks: tuple[str, ...]
    model: str
    method: MethodConfig
    sae: SAEConfig
    domains: tuple[str, ...]
    max_length: int
    seed: int
    evaluation: EvaluationConfig
    accelerator: str
    logger: LoggerConfig


def steps(config: Config, variant: Callable[..., Config]) -> tuple[Step, ...]:
    """One step a condition and replicate; where no conditions are named, the configuration's."""
    given = _checked(config)
    if not (given["adapters"] or given["saes"]):
        return (_step(config, given, config.method.name, trained=True),)
    if len(config.study.seeds) > 1 and "adapter" not in config.study.vary:
        raise UserError(
            f"study.vary={config.study.vary}: stage=splicing tells replicates apart by the "
            "adapter's seed: add adapter"
        )
    found = []
    for seed in config.study.seeds:
        for kind in ("saes", "adapters"):
            for name, overrides in given[kind].items():
                own = variant(*overrides, *replicate(config, seed))
                found.append(_step(own, given, name, trained=kind == "adapters"))
    return tuple(found)


def _checked(config: Config) -> dict[str, Any]:
    given = DEFAULTS | config.stage.settings
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise UserError(
            f"stage.settings.{unknown[0]}: stage=splicing has {', '.join(DEFAULTS)} alone"
        )
    if type(given["rows"]) is not int or given["rows"] < 2:
        raise UserError(f"stage.settings.rows={given['rows']}: a number of rows from 2")
    for kind in ("adapters", "saes"):
        for name, overrides in given[kind].items():
            if not isinstance(overrides, (list, tuple)):
                raise UserError(f"stage.settings.{kind}.{name}={overrides}: a list of overrides")
    names = {*given["adapters"], *given["saes"]}
    for key in ("scored", "references"):
        for name in given[key]:
            if name not in names:
                raise UserError(f"stage.settings.{key}: there is no {name}: {nearest(name, names)}")
    return given


def _step(config: Config, given: dict[str, Any], condition: str, *, trained: bool) -> Step:
    method = config.method
    if not method.splices:
        able = ", ".join(name for name, kind in METHODS.items() if kind.splices)
        raise UserError(
            f"stage=splicing is about SAEs in place of streams, which method={method.name} leaves "
            f"as they are: give method=<option> of kind {able}"
        )
    alone = not (given["adapters"] or given["saes"])
    settings = SplicingSettings(
        condition=condition,
        trained=trained,
        rows=given["rows"],
        tasks=tuple(given["tasks"]) if alone or condition in given["scored"] else (),
        model=config.model.name,
        method=method,
        sae=config.sae,
        domains=tuple(config.domains.names),
        max_length=config.trainer.max_length,
        seed=config.seed,
        evaluation=config.evaluation,
        accelerator=config.trainer.accelerator,
        logger=config.logger,
    )
    inputs = base.inputs(config) | {"saes": sae_training.steps(config)}
    if trained:
        inputs["adapter"] = adapter_training.step(config)
    label = f"splicing {config.model.name} {condition} seed {config.seed}"
    return Step("splicing", settings, inputs, label, cost=8)


def report(config: Config, artifacts: list[Artifact], provenance: dict[str, Any]) -> Report:
    """Claims, tables and a figure of an experiment's conditions."""
    records = [read_record(artifact / RESULT, Splicing) for artifact in artifacts]
    return write_splicing(config, records, provenance)


@stage(
    "splicing",
    f"2.{SCHEMA}",
    steps=steps,
    report=report,
    # What is trained counts by the artifacts that are read.
    skip=WHERE | {"logger", "evaluation.batch_size", "method.cached_tokens", "sae.path"},
)
def build(context: Context) -> dict:
    settings: SplicingSettings = context.config
    model, tokenizer = load_base(context.inputs["base"], accelerator=settings.accelerator)
    method = _attached(context, model, tokenizer)
    rows = other_general_text(
        context.inputs["domains"],
        settings.domains,
        tokenizer,
        settings.max_length,
        settings.rows,
    )
    measured = Measurement(model, method)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)
        for indices in by_length(rows, BATCH_SIZE):
            batch = collate([rows[i] for i in indices], [-1] * len(indices), tokenizer.pad_token_id)
            measured.add(indices, batch.to(model.device))
    scores = {}
    if settings.tasks:
        scorer = Scorer(context.inputs["domains"], model, tokenizer, settings.evaluation)
        for way in WAYS:
            with running(method, way):
                found = scorer.tasks(list(settings.tasks))
            scores[way] = {n: Estimate(score.value, score.stderr) for n, score in found.items()}
    length = sum(len(row.input_ids) for row in rows) / len(rows)
    record = Splicing(
        model=settings.model,
        method=settings.method.name,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        condition=settings.condition,
        sites=tuple(settings.method.sites),
        **measured.result()._asdict(),
        scores=scores,
        parameters=method.parameter_count() if settings.trained else 0,
        cost=_cost(context, method, length),
    )
    write_record(context.directory / RESULT, record)
    figures = {f"loss/{way}": record.loss(way) for way in WAYS}
    figures |= {f"kl/{way}": record.kl(way) for way in WAYS[1:]}
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures | {"parameters": record.parameters}


def _attached(context: Context, model: nn.Module, tokenizer: Any) -> Method:
    """The trained method, or an untrained one, which changes nothing around its SAEs."""
    settings: SplicingSettings = context.config
    if settings.trained:
        return load_adapter(model, context.inputs["adapter"] / adapter_training.FOLDER)
    folders = [artifact / sae_training.FOLDER for artifact in context.inputs["saes"]]
    saes = {
        site: SiteSAE(load_sae(folder))
        for site, folder in zip(settings.method.sites, folders, strict=True)
    }
    sources = Sources(saes=saes, signal_tokens=signal_tokens_of(tokenizer))
    return settings.method.build(model, sources, settings.seed)


def _cost(context: Context, method: Method, length: float) -> Cost:
    """Of the adapter's training, and of the SAEs' end to end.

    Args:
        length: mean tokens of a row.
    """
    settings: SplicingSettings = context.config
    shape = DecoderShape.complete(method.model.config)
    tokens = flops = seconds = 0.0
    if settings.trained:
        tokens, seconds = _training(context.inputs["adapter"])
        learner = settings.method.learner(
            method,
            model=method.model,
            domains=settings.domains,
            pad_token_id=0,
            seed=settings.seed,
            intervention=InterventionConfig(),
        )
        each = learner.flops_per_token(shape, Text(length, 1.0)) if shape else None
        flops = tokens * (each or 0.0)
    if settings.sae.end_to_end.steps:
        for (site, sae), artifact in zip(method.saes.items(), context.inputs["saes"], strict=True):
            own = _training(artifact)
            each = splicing_flops_per_token(shape, site, length) if shape else 0.0
            each += settings.sae.build(sae.width).training_flops_per_token()
            tokens, seconds = tokens + own[0], seconds + own[1]
            flops += own[0] * each
    return Cost(tokens=tokens, flops=flops, seconds=seconds)


def _training(artifact: Artifact) -> tuple[float, float]:
    """Tokens and seconds of a training; an SAE has under "tokens" those that it is measured on."""
    figures = artifact.manifest["summary"]
    seconds = figures["seconds"]
    return float(round(figures["tokens_per_second"] * seconds)), seconds
