"""Stage ``causal_ablation``: a trained adapter under every control, on every domain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from steerlora.config import Config
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.evaluation.records import (
    INTACT,
    SCHEMA,
    Ablation,
    Evaluation,
    read_record,
    write_record,
)
from steerlora.evaluation.scores import Score
from steerlora.evaluation.scoring import Scorer
from steerlora.methods.interventions import INTERVENTIONS
from steerlora.stages import adapter_training, base, evaluate
from steerlora.stages.common import WHERE, run_log

RESULT = "ablation.json"


@dataclass(frozen=True, kw_only=True)
class AblationSettings(evaluate.ScoringSettings):
    """What an ablation depends on; ``intervention``: strength, sites and domains of all of them."""

    interventions: tuple[str, ...]
    """Their names."""
    doses: tuple[float, ...]
    """Strengths below 1 at which they are repeated."""


def step(config: Config) -> Step:
    """The controls are ``study.interventions``; all of them where that is empty."""
    config.method.check_trains()
    names = tuple(config.study.interventions or INTERVENTIONS)
    for name in names:
        INTERVENTIONS.check("study.interventions", name)
    if not config.method.has_control_signal:
        raise UserError(
            "stage=causal_ablation changes a control signal of SAE features, and "
            f"method={config.method.name} has none"
        )
    if config.intervention.phase == "training":
        raise UserError(
            "stage=causal_ablation breaks the signal of an adapter that was trained with it: "
            "leave intervention.phase at evaluation; stage=evaluate scores retrained controls"
        )
    doses = tuple(config.study.doses)
    settings = AblationSettings.of(config, interventions=names, doses=doses)
    inputs = base.inputs(config) | {
        "adapter": adapter_training.step(config),
        "intact": evaluate.step(config, targets=True),
    }
    label = f"causal_ablation {config.model.name} {config.method.name} seed {config.seed}"
    return Step(
        "causal_ablation",
        settings,
        inputs,
        label,
        cost=4 * len(names) * (1 + len(config.study.doses)),
    )


@stage(
    "causal_ablation",
    f"3.{SCHEMA}",
    step=step,
    skip=WHERE | {"logger"} | evaluate.BY_CONTENT,
)
def build(context: Context) -> dict:
    settings: AblationSettings = context.config
    method, scorer = evaluate.open_scorer(context)
    names = _domains(scorer)
    intact = read_record(context.inputs["intact"] / evaluate.SCORES, Evaluation)
    scores = {INTACT: {name: intact.tasks[scorer.domains.target_tasks[name]] for name in names}}
    strengths = (settings.intervention.strength, *settings.doses)
    doses: dict[str, dict[float, dict[str, Score]]] = {}
    total = len(settings.interventions) * len(strengths) * len(names)
    with context.progress.task(context.label, total, unit="score") as task:
        for intervention, strength in product(settings.interventions, strengths):
            changed = replace(
                settings.intervention, name=intervention, strength=strength, seed=settings.seed
            )
            found = {}
            for name in names:
                with evaluate.intervened(method, changed, name):
                    found |= scorer.targets([name])
                task.advance(note=f"{intervention} {strength:g} {name}")
            if strength in settings.doses:
                doses.setdefault(intervention, {})[strength] = found
            else:
                scores[intervention] = found
    record = Ablation(
        model=settings.model,
        method=settings.method,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        domains=names,
        interventions=scores,
        doses=doses,
    )
    write_record(context.directory / RESULT, record)
    means = {
        name: sum(score.value for score in by_domain.values()) / len(by_domain)
        for name, by_domain in scores.items()
    }
    with run_log(context, settings.logger) as log:
        log.results(means, record)
    return means


def _domains(scorer: Scorer) -> tuple[str, ...]:
    """The domains whose own tasks are asked for; all of them where none is."""
    chosen, targets = scorer.suite.chosen, scorer.domains.target_tasks
    asked = tuple(name for name in scorer.domains.names if targets[name] in chosen)
    return asked or scorer.domains.names
