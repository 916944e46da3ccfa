"""Stage ``evaluate``: the base or an adapter on every task, and the health of its routing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from steerlora.config import Config, EvaluationConfig, InterventionConfig, LoggerConfig
from steerlora.data.chat import collate, encode_chats
from steerlora.data.jsonl import read_rows
from steerlora.engine.artifacts import Artifact
from steerlora.engine.run import Context, Stage, Step, register
from steerlora.evaluation import local_rows, registered
from steerlora.evaluation.records import (
    BASE,
    SCHEMA,
    Evaluation,
    Routing,
    RoutingAtStep,
    write_record,
)
from steerlora.evaluation.scores import averages
from steerlora.evaluation.scoring import Scorer
from steerlora.evaluation.suite import OWN
from steerlora.lm.decoder import decoder_of
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.health import RoutingHealth
from steerlora.methods.routed_lora.saving import load_adapter
from steerlora.stages import adapter_training, adapting, base, domains
from steerlora.stages.common import WHERE, load_base, run_log

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Attributes: adapter: its name, ``BASE`` for none; hard_rank: of it; files: a digest of the
    rows that the user gives; accelerator: where the model runs; otherwise as in the
    configuration."""

    evaluation: EvaluationConfig
    intervention: InterventionConfig
    model: str
    adapter: str
    hard_rank: float
    files: str
    seed: int
    accelerator: str
    logger: LoggerConfig


def step(config: Config, *, adapted: bool = True, every_task: bool = False) -> Step:
    """Scores of the adapter, or (``adapted=False``) of the base alone.

    ``every_task`` is for what compares with these scores: all tasks, whatever the user asked for.
    """
    evaluation = replace(config.evaluation, tasks=None) if every_task else config.evaluation
    _check_tasks(evaluation)
    intervention = config.intervention if adapted else InterventionConfig()
    if adapted:
        adapting.check_intervention(config)
    settings = EvaluationSettings(
        evaluation=evaluation,
        intervention=intervention,
        model=config.model.name,
        adapter=config.adapter.name if adapted else BASE,
        hard_rank=config.adapter.hard_rank if adapted else 0.0,
        files=local_rows.digest(evaluation.files),
        seed=config.seed if adapted else 0,
        accelerator=config.trainer.accelerator,
        logger=config.logger,
    )
    inputs = {"domains": domains.step(config), "base": base.step(config)}
    if adapted:
        inputs["adapter"] = adapter_training.step(config)
    what = f"{config.adapter.name} seed {config.seed}" if adapted else "base"
    changed = "" if intervention.name == "none" else f" {intervention.name}"
    changed += " retrained" if changed and intervention.phase == "training" else ""
    return Step(
        "evaluate", settings, inputs, f"evaluate {config.model.name} {what}{changed}", cost=10
    )


def _check_tasks(evaluation: EvaluationConfig) -> None:
    """UserError for a task that lm-eval does not know, before hours of training and not after."""
    grouped = (task for tasks in evaluation.groups.values() for task in tasks)
    for name in {*grouped, *evaluation.metrics, *evaluation.shots, *evaluation.files}:
        if not name.startswith(OWN):
            registered.find(name)


def build(context: Context) -> dict:
    settings: EvaluationSettings = context.config
    model, tokenizer = load_base(
        context.inputs["base"],
        accelerator=settings.accelerator,
        spread=settings.evaluation.spread,
    )
    adapter = None
    if "adapter" in context.inputs:
        adapter = load_adapter(model, context.inputs["adapter"] / adapter_training.FOLDER)
        adapter.truncate(settings.hard_rank)
    source = context.inputs["domains"]
    scorer = Scorer(source, model, tokenizer, settings.evaluation)
    suite = scorer.suite
    names = settings.evaluation.tasks or suite.tasks
    owners = suite.owners
    scores = {}
    with context.progress.task(context.label, len(names), unit="task") as task:
        for name in names:
            with control(adapter, settings.intervention, owners.get(name)):
                scores |= scorer.tasks([name])
            task.advance(note=name)
    routing = _routing(source, model, tokenizer, adapter, settings, scorer.max_length)
    history = []
    if adapter is not None:
        history = context.inputs["adapter"].json(adapter_training.HISTORY)["routing"]
    record = Evaluation(
        model=settings.model,
        method=settings.adapter,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        domains=scorer.domains.names,
        tasks=scores,
        averages=averages(scores, suite.averaged),
        groups=suite.groups,
        target_tasks=scorer.domains.target_tasks,
        intervention=settings.intervention.name,
        phase=settings.intervention.phase,
        routing_by_site=routing,
        routing_history=tuple(RoutingAtStep(**measured) for measured in history),
        stand_ins=tuple(scorer.stand_ins),
    )
    write_record(context.directory / SCORES, record)
    figures = {f"score/{name}": score.value for name, score in scores.items()}
    figures |= {f"average/{name}": group.value for name, group in record.averages.items()}
    with run_log(context, settings.logger) as log:
        log.summary(figures)
        log.table(
            "scores",
            ["task", "metric", "value", "stderr", "items", "version", "shots"],
            [
                [name, s.metric, s.value, s.stderr, s.items, s.version, s.shots]
                for name, s in scores.items()
            ],
        )
    return figures


def control(adapter: Adapter | None, config: InterventionConfig, domain: str | None):
    """The intervention's context; a task that is no domain's own has no oracle."""
    oracle = config.name == "oracle_domain"
    if adapter is None or config.name == "none" or (oracle and domain is None):
        return nullcontext()
    return adapter.intervention(
        config.name,
        seed=config.seed,
        domain=domain,
        strength=config.strength,
        sites=config.sites,
        domains=config.domains,
    )


@torch.no_grad()
def _routing(
    source: Artifact,
    model,
    tokenizer,
    adapter: Adapter | None,
    settings: EvaluationSettings,
    max_length: int,
) -> dict[int, Routing]:
    """{site: routing} over the held-out rows of every domain."""
    if adapter is None:
        return {}
    names = source.json("domains.json")["names"]
    available = adapter.available()
    health = {
        site: RoutingHealth(names, adapter.shape.specialists, active=available, seed=settings.seed)
        for site in adapter.sites
    }
    size = settings.evaluation.batch_size
    for owner, name in enumerate(names) if health else ():
        rows = encode_chats(tokenizer, read_rows(source / f"heldout/{name}.jsonl"), max_length)
        rows.sort(key=lambda row: len(row.input_ids))
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            batch = collate(chosen, [owner] * len(chosen), tokenizer.pad_token_id)
            batch = batch.to(model.device)
            decoder_of(model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            real = batch.attention_mask.bool()
            owners = batch.domains[:, None].expand_as(real)[real]
            sequences = torch.arange(len(chosen), device=real.device)[:, None].expand_as(real)[real]
            for site, routing in adapter.routing().items():
                ranks = routing.mask[real].sum(-1)
                health[site].update(routing.gate[real], ranks, owners, start + sequences)
    return {site: Routing(**seen.result()) for site, seen in health.items()}


STAGE = register(
    Stage(
        "evaluate",
        f"4.{SCHEMA}",
        build,
        # The files' place does not matter, their content does.
        skip=WHERE | {"logger", "evaluation.batch_size", "evaluation.files"},
    )
)
