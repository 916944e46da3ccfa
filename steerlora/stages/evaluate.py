"""Stage ``evaluate``: the base or an adapter on every task, and the health of its routing."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

import torch

from steerlora.config import Config, EvaluationConfig, InterventionConfig, LoggerConfig
from steerlora.config.checks import one_of
from steerlora.data.batches import batches_by_length
from steerlora.data.chat import encode_chats
from steerlora.data.jsonl import read_rows
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError, nearest
from steerlora.evaluation import local_rows, registered
from steerlora.evaluation.harness import TASKS
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
from steerlora.evaluation.suite import OWN, TARGET
from steerlora.lm.decoder import decoder_of
from steerlora.methods.base import Method
from steerlora.methods.interventions import INTERVENTIONS
from steerlora.methods.saving import load_adapter
from steerlora.stages import adapter_training, base, method_training
from steerlora.stages.common import WHERE, domain_names, load_base, run_log

SCORES = "scores.json"
MICRO = TASKS / "micro"
"""Where the tasks of the micro world lie."""
BY_CONTENT = frozenset(
    f"evaluation.{key}" for key in ("batch_size", "files", "folder", "include_path", "limits")
)
"""Keys that do not change scores, or count by what a digest says of them (`EvaluationSettings`):
the user's files by content, not by place."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """What scoring a model depends on; where no comment says otherwise, as in the configuration."""

    evaluation: EvaluationConfig
    intervention: InterventionConfig
    model: str
    method: str
    """Its name, `BASE` for the base."""
    options: dict[str, Any]
    """Of the method, at evaluation."""
    seed: int
    """Of the method, and of every draw."""
    accelerator: str
    """Where the model runs."""
    logger: LoggerConfig

    @classmethod
    def of(cls, config: Config, *, adapted: bool = True, **more: Any) -> Self:
        """Of the adapter in a configuration, or of its base alone; ``more``: a subclass's own."""
        return cls(
            evaluation=config.evaluation,
            intervention=config.intervention if adapted else InterventionConfig(),
            model=config.model.name,
            method=config.method.name if adapted else BASE,
            options=config.method.at_evaluation if adapted else {},
            seed=config.seed if adapted else 0,
            accelerator=config.trainer.accelerator,
            logger=config.logger,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(ScoringSettings):
    """What an evaluation depends on."""

    files: str
    """A digest of the rows and the task files that the user gives, and of the limits of tasks."""


def step(config: Config, *, adapted: bool = True, targets: bool = False) -> Step:
    """Scores of the adapter, or of the base alone (``adapted=False``, or nothing that trains).

    ``targets`` is for what compares with these scores: the domains' own tasks, and those that the
    user asked for.
    """
    run = _check_tasks(config)
    asked = config.evaluation.tasks
    if targets and asked is not None and TARGET not in asked:
        config = replace(config, evaluation=replace(config.evaluation, tasks=[TARGET, *asked]))
    if adapted:
        method_training.check_intervention(config)
    adapted = adapted and config.method.trains
    files = local_rows.digest(config.evaluation, run)
    settings = EvaluationSettings.of(config, adapted=adapted, files=files)
    intervention = settings.intervention
    inputs = base.inputs(config)
    if adapted:
        inputs["adapter"] = adapter_training.step(config)
    what = f"{config.method.name} seed {config.seed}" if adapted else "base"
    changed = "" if intervention.name == "none" else f" {intervention.name}"
    changed += " retrained" if changed and intervention.phase == "training" else ""
    return Step(
        "evaluate", settings, inputs, f"evaluate {config.model.name} {what}{changed}", cost=10
    )


def _check_tasks(config: Config) -> set[str]:
    """Refuse, before hours of training and not after, a task that nothing knows, and settings of a
    task that does not run.

    Returns:
        The tasks of lm-eval's own that run.

    Raises:
        UserError: names it.
    """
    evaluation = config.evaluation
    grouped = [task for tasks in evaluation.groups.values() for task in tasks]
    run = {*grouped, *(evaluation.tasks or ())} - {TARGET}
    named = (evaluation.metrics, evaluation.shots, evaluation.files, evaluation.limits)
    for name in {*run, *chain.from_iterable(named)}:
        if not name.startswith(OWN):
            registered.find(name, evaluation.include_path)
        elif config.domains.kind == "micro":
            one_of("task", name, [path.stem for path in MICRO.glob("micro_*.yaml")])
    for name in evaluation.shots:
        if name.startswith(OWN):
            raise UserError(f"evaluation.shots.{name}: the domains' own tasks have no examples")
        _refuse_idle("shots", name, run)
    for name in evaluation.metrics:
        # Where groups are given, metrics may stand ready for more than the tasks of a narrower run.
        if not evaluation.groups and not name.startswith(OWN):
            _refuse_idle("metrics", name, run)
    asked = run if evaluation.tasks is None else {*evaluation.tasks}
    return {name for name in asked if not name.startswith(OWN) and name != TARGET}


def _refuse_idle(key: str, name: str, run: Collection[str]) -> None:
    if name not in run:
        raise UserError(
            f"evaluation.{key}.{name}: this task does not run: evaluation.groups and "
            f"evaluation.tasks name those that do; {nearest(name, run)}"
        )


def open_scorer(context: Context) -> tuple[Method | None, Scorer]:
    """What scores a stage's base, with the adapter attached if the stage reads one."""
    settings, inputs = context.config, context.inputs
    model, tokenizer = load_base(
        inputs["base"], accelerator=settings.accelerator, spread=settings.evaluation.spread
    )
    method = None
    if "adapter" in inputs:
        method = load_adapter(model, inputs["adapter"] / adapter_training.FOLDER)
        method.configure(**settings.options)
    return method, Scorer(inputs["domains"], model, tokenizer, settings.evaluation)


@stage(
    "evaluate",
    f"4.{SCHEMA}",
    step=step,
    skip=WHERE | {"logger"} | BY_CONTENT,
)
def build(context: Context) -> dict:
    settings: EvaluationSettings = context.config
    method, scorer = open_scorer(context)
    suite = scorer.suite
    names = suite.chosen
    owners = suite.owners
    scores = {}
    with context.progress.task(context.label, len(names), unit="task") as task:
        for name in names:
            with intervened(method, settings.intervention, owners.get(name)):
                scores |= scorer.tasks([name])
            task.advance(note=name)
    routing = _health(context, method, scorer)
    history = []
    if method is not None:
        history = context.inputs["adapter"].json(adapter_training.HISTORY).get("routing", [])
    record = Evaluation(
        model=settings.model,
        method=settings.method,
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
        log.results(figures, record)
    return figures


def intervened(
    method: Method | None, config: InterventionConfig, domain: str | None
) -> AbstractContextManager[Any]:
    """The intervention's context; one that needs the true domain leaves other tasks alone."""
    if method is None or config.name == "none":
        return nullcontext()
    if domain is None and INTERVENTIONS[config.name].needs_domain:
        return nullcontext()
    return method.intervention(
        config.name,
        seed=config.seed,
        domain=domain,
        strength=config.strength,
        sites=config.sites,
        domains=config.domains,
    )


@torch.no_grad()
def _health(context: Context, method: Method | None, scorer: Scorer) -> dict[int, Routing]:
    """{site: what the method measures of itself} over the held-out rows of every domain."""
    source, settings = context.inputs["domains"], context.config
    names = domain_names(source)
    health = method.health(names, settings.seed) if method is not None else None
    if health is None:
        return {}
    model, tokenizer, size = scorer.model, scorer.tokenizer, settings.evaluation.batch_size
    for owner, name in enumerate(names):
        rows = encode_chats(
            tokenizer, read_rows(source / f"heldout/{name}.jsonl"), scorer.max_length
        )
        first = 0
        for batch in batches_by_length(rows, size, tokenizer.pad_token_id, owner):
            batch = batch.to(model.device)
            decoder_of(model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            health.update(batch, first)
            first += len(batch.input_ids)
    return {int(site): Routing(**measured) for site, measured in health.result().items()}
