"""Stage ``sequential_forgetting``: one adapter carried through the domains, scored after each."""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.config import (
    AdapterConfig,
    Config,
    ContinualConfig,
    ControlConfig,
    EvaluationConfig,
    InterventionConfig,
    LoggerConfig,
    RoutingConfig,
    TrainerConfig,
)
from steerlora.data.orders import sequence_of
from steerlora.engine.run import Context, Stage, Step, register
from steerlora.evaluation.forgetting import forgetting_metrics
from steerlora.evaluation.records import (
    SCHEMA,
    DomainSequence,
    Evaluation,
    GeneralKnowledge,
    MemoryEvent,
    read_record,
    write_record,
)
from steerlora.evaluation.scores import Score, averages
from steerlora.stages import adapting, evaluate
from steerlora.stages.carried import Carried
from steerlora.stages.carrying import Carrier, Judge
from steerlora.stages.common import NOT_IDENTITY, run_log

RESULT = "sequential.json"
GENERAL = "general_knowledge"


@dataclass(frozen=True, kw_only=True)
class SequenceSettings:
    """Attributes: sequence: the domains as they come; broad: the broad one among them; otherwise as
    in the configuration."""

    adapter: AdapterConfig
    control: ControlConfig
    routing: RoutingConfig
    continual: ContinualConfig
    intervention: InterventionConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    sequence: tuple[str, ...]
    broad: str
    steps_per_domain: int
    order: str
    model: str
    seed: int
    logger: LoggerConfig


def step(config: Config) -> Step:
    adapting.check_intervention(config)
    settings = SequenceSettings(
        adapter=config.adapter,
        control=config.control,
        routing=config.routing,
        continual=config.continual,
        intervention=config.intervention,
        trainer=config.trainer,
        evaluation=config.evaluation,
        sequence=sequence_of(config.order, config.domains),
        broad=config.domains.broad,
        steps_per_domain=config.order.steps_per_domain,
        order=config.order.name,
        model=config.model.name,
        seed=config.seed,
        logger=config.logger,
    )
    inputs = adapting.inputs(config, monitored=config.control.monitor is not None)
    inputs["base_scores"] = evaluate.step(config, adapted=False, every_task=True)
    label = (
        f"sequential_forgetting {config.model.name} {config.adapter.name} "
        f"{config.order.name} seed {config.seed}"
    )
    cost = len(settings.sequence) * (config.order.steps_per_domain * config.model.layers * 0.02 + 4)
    return Step("sequential_forgetting", settings, inputs, label, cost=cost)


def build(context: Context) -> dict:
    settings: SequenceSettings = context.config
    names = context.inputs["domains"].json("domains.json")["names"]
    with run_log(context, settings.logger) as log:
        done = Carried.resumed(context.directory, context.fingerprint)
        done = done or Carried([_base_row(context, names)])
        carrier = Carrier(context, log, done)
        while done.domains < len(settings.sequence):
            carrier.learn(done.domains)
            with carrier.judged() as judge:
                done.rows.append(_row(judge.targets(), names) if judge else {})
                if judge and judge.adapted.monitor:
                    done.drift.append(judge.drift())
                if judge:
                    done.save(context.directory, context.fingerprint)
                    log.table("scores after each domain", ["stage", *names], _table(done.rows))
        with carrier.judged() as judge:
            if judge is None:
                return {}
            record = _record(context, names, done, judge)
        log.summary({f"forgetting/{name}": value for name, value in record.metrics.items()})
    write_record(context.directory / RESULT, record)
    return record.metrics


def _record(context: Context, names: list[str], done: Carried, judge: Judge) -> DomainSequence:
    """What the sequence comes to."""
    settings: SequenceSettings = context.config
    base = _base_scores(context)
    groups = judge.scorer.suite.groups
    tasks = [task for task in groups.get(GENERAL, []) if task in base.tasks]
    general = None
    if tasks:
        after = averages(judge.scorer.tasks(tasks), groups)[GENERAL]
        general = GeneralKnowledge(before=base.averages[GENERAL], after=after)
    matrix = [row["values"] for row in done.rows]
    return DomainSequence(
        model=settings.model,
        method=settings.adapter.name,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        order=settings.order,
        sequence=settings.sequence,
        broad=settings.broad,
        domains=tuple(names),
        matrix=matrix,
        stderr=[row["stderr"] for row in done.rows],
        items=done.rows[0]["items"],
        metrics=forgetting_metrics(matrix, sequence=settings.sequence, domains=names),
        general=general,
        drift=tuple(done.drift),
        events=tuple(MemoryEvent(**event) for event in done.events),
        replay=settings.continual.replay_ratio,
    )


def _base_scores(context: Context) -> Evaluation:
    return read_record(context.inputs["base_scores"] / evaluate.SCORES, Evaluation)


def _base_row(context: Context, names: list[str]) -> dict:
    """The base's scores, which are row 0."""
    domains = context.inputs["domains"].json("domains.json")
    tasks = _base_scores(context).tasks
    return _row({name: tasks[domains["target_tasks"][name]] for name in names}, names)


def _row(scores: dict[str, Score], names: list[str]) -> dict:
    """One row of the score matrix: a value and a standard error a domain."""
    return {
        "values": [scores[name].value for name in names],
        "stderr": [scores[name].stderr for name in names],
        "items": min(scores[name].items for name in names),
    }


def _table(rows: list[dict]) -> list[list]:
    return [[stage, *row["values"]] for stage, row in enumerate(rows)]


STAGE = register(
    Stage(
        "sequential_forgetting",
        f"3.{SCHEMA}",
        build,
        skip=NOT_IDENTITY
        | {
            "trainer.max_steps",
            "evaluation.batch_size",
            "evaluation.files",
            "evaluation.spread",
            "routing.collapse",
            "routing.collapse_below",
        },
        shared=True,
        check=lambda settings: adapting.check_shares(settings.trainer),
    )
)
