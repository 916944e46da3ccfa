"""Stage ``sequential_forgetting``: one method through the domains, scored after each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steerlora.config import Config, EvaluationConfig
from steerlora.data.orders import sequence_of
from steerlora.engine.steps import Context, Step, stage
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
from steerlora.evaluation.suite import Domains
from steerlora.stages import evaluate, method_training
from steerlora.stages.common import NOT_IDENTITY, domain_names, run_log
from steerlora.stages.sequence import SequenceScorer, SequenceTrainer
from steerlora.stages.sequence_state import SequenceState

RESULT = "sequential.json"
GENERAL = "general_knowledge"


@dataclass(frozen=True, kw_only=True)
class SequenceSettings(method_training.TrainingSettings):
    """What a sequence depends on; where no comment says otherwise, as in the configuration."""

    evaluation: EvaluationConfig
    sequence: tuple[str, ...]
    """The domains as they come."""
    broad: str | None
    """The broad one among them, if there is one."""
    steps_per_domain: int
    order: str
    model: str


def step(config: Config) -> Step:
    config.method.check_trains()
    method_training.check_intervention(config)
    settings = SequenceSettings.of(
        config,
        config.intervention,
        evaluation=config.evaluation,
        sequence=sequence_of(config.order, config.domains),
        broad=config.domains.broad,
        steps_per_domain=config.order.steps_per_domain,
        order=config.order.name,
        model=config.model.name,
    )
    inputs = method_training.inputs(config, monitored=config.method.monitor is not None)
    inputs["base_scores"] = evaluate.step(config, adapted=False, targets=True)
    label = (
        f"sequential_forgetting {config.model.name} {config.method.name} "
        f"{config.order.name} seed {config.seed}"
    )
    a_domain = config.order.steps_per_domain * config.model.layers * 0.02 + 4
    whole = Step(
        "sequential_forgetting",
        settings,
        inputs,
        label,
        cost=len(settings.sequence) * a_domain,
        skip=method_training.not_identity(config, sequence=True),
    )
    begun = range(len(settings.sequence) - 1, 0, -1)
    earlier = (replace(settings, sequence=settings.sequence[:domains]) for domains in begun)
    return replace(whole, earlier=tuple(replace(whole, config=shorter) for shorter in earlier))


@stage(
    "sequential_forgetting",
    f"5.{SCHEMA}",
    step=step,
    skip=NOT_IDENTITY | {"trainer.max_steps", "evaluation.spread"} | evaluate.BY_CONTENT,
    shared=True,
    check=lambda settings: method_training.check_shares(settings.trainer),
)
def build(context: Context) -> dict:
    settings: SequenceSettings = context.config
    names = domain_names(context.inputs["domains"])
    with run_log(context, settings.logger) as log:
        state = SequenceState(context.directory, settings.sequence, [_base_row(context, names)])
        if context.earlier:
            state.take_over(context.earlier.path)
        state.resume()
        trainer = SequenceTrainer(context, log, state)
        while state.scored < len(settings.sequence):
            if state.trained == state.scored:
                trainer.train(state.trained)
            with trainer.scorer() as scorer:
                row = _row(scorer.targets(), names, scorer.written()) if scorer else {}
                state.rows.append(row)
                drift = scorer.drift() if scorer else None
                if drift is not None:
                    state.drift.append(drift)
                if scorer:
                    state.save_scores()
                    log.stage_of_sequence(len(state.rows) - 1, _targets(state.rows[-1], names))
        with trainer.scorer() as scorer:
            if scorer is None:
                return {}
            record = _record(context, names, state, scorer)
        log.results(record.metrics, record)
    write_record(context.directory / RESULT, record)
    return record.metrics


def _record(
    context: Context, names: list[str], state: SequenceState, scorer: SequenceScorer
) -> DomainSequence:
    """What the sequence comes to."""
    settings: SequenceSettings = context.config
    base = _base_scores(context)
    groups = scorer.scorer.suite.groups
    tasks = [task for task in groups.get(GENERAL, []) if task in base.tasks]
    general = None
    if tasks:
        after = averages(scorer.scorer.tasks(tasks), groups)[GENERAL]
        general = GeneralKnowledge(before=base.averages[GENERAL], after=after)
    matrix = [row["values"] for row in state.rows]
    events = scorer.attached.learner.history().get("events", [])
    return DomainSequence(
        model=settings.model,
        method=settings.method.name,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        order=settings.order,
        sequence=settings.sequence,
        broad=settings.broad,
        domains=tuple(names),
        matrix=matrix,
        stderr=[row["stderr"] for row in state.rows],
        items=state.rows[0]["items"],
        metrics=forgetting_metrics(matrix, sequence=settings.sequence, domains=names),
        general=general,
        drift=tuple(state.drift),
        events=tuple(MemoryEvent(**event) for event in events),
        replay=settings.method.replay.ratio,
        written=[row["written"] for row in state.rows if row.get("written")],
    )


def _base_scores(context: Context) -> Evaluation:
    return read_record(context.inputs["base_scores"] / evaluate.SCORES, Evaluation)


def _base_row(context: Context, names: list[str]) -> dict:
    """The base's scores, which are row 0."""
    domains, tasks = Domains.read(context.inputs["domains"].path), _base_scores(context).tasks
    targets, written = (
        {name: tasks[task] for name, task in of.items()}
        for of in (domains.target_tasks, domains.written_tasks)
    )
    return _row(targets, names, written)


def _row(scores: dict[str, Score], names: list[str], written: dict[str, Score]) -> dict:
    """One row of the score matrix: a value and a standard error a domain.

    Args:
        scores: {domain: of its target}.
        names: the domains, in order.
        written: {domain: of the answers that are written out}; empty where none are.
    """
    row = {
        "values": [scores[name].value for name in names],
        "stderr": [scores[name].stderr for name in names],
        "items": min(scores[name].items for name in names),
    }
    return row | ({"written": [written[name].value for name in names]} if written else {})


def _targets(row: dict, names: list[str]) -> dict[str, float]:
    """A row of the score matrix, for the run's log."""
    return {f"target/{name}": value for name, value in zip(names, row["values"], strict=True)}
