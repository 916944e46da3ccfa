"""From records to effects with intervals: gains, and drops under interventions.

Every function here takes records (`steerlora.evaluation.records`) and returns a `Measure`, or None
where those that it needs are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from steerlora.evaluation import statistics
from steerlora.evaluation.records import BASE, INTACT, Ablation, Evaluation, Record
from steerlora.evaluation.scores import Estimate, Score
from steerlora.evaluation.statistics import Interval, Paired, Runs
from steerlora.reporting.methods import Methods


class Measure(NamedTuple):
    """One effect: what it is of, its interval, and the artifacts it came from."""

    label: str
    interval: Interval
    fingerprints: tuple[str, ...]


def select(records: Iterable[Record], **where: object) -> list[Record]:
    """Records whose fields equal the given ones, by seed."""
    chosen = [r for r in records if all(getattr(r, key) == value for key, value in where.items())]
    return sorted(chosen, key=lambda record: record.seed)


def by_method(records: Iterable[Record], model: str, methods: Methods) -> dict[str, list[Record]]:
    """{method: its records of one model}, in the report's order of methods."""
    chosen = select(records, model=model)
    names = methods.sorted(record.method for record in chosen)
    return {name: select(chosen, method=name) for name in names}


def uncontrolled(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Those of models as they are: neither evaluated nor trained under an intervention."""
    return [r for r in evaluations if r.intervention == "none"]


def retrained(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Those of methods that were trained, and then evaluated, under an intervention."""
    return [r for r in evaluations if r.phase == "training" and not uncontrolled([r])]


def fingerprints(records: Iterable[Record]) -> tuple[str, ...]:
    """The distinct fingerprints of some records, in their order."""
    return tuple(dict.fromkeys(record.fingerprint for record in records))


def mean_of(scores: Sequence[Score | Estimate]) -> Estimate:
    """Their mean, with the error that it has if they are independent."""
    errors = np.array([score.stderr for score in scores])
    mean = np.mean([score.value for score in scores])
    return Estimate(float(mean), float(np.sqrt((errors**2).sum()) / len(errors)))


def base_pairs(
    evaluations: list[Evaluation], model: str, method: str
) -> list[tuple[Evaluation, Evaluation]]:
    """(base, adapted) evaluations of one model, seed by seed.

    A base model that was evaluated under one seed only stands beside every seed.
    """
    bases = select(evaluations, model=model, method=BASE)
    by_seed = {record.seed: record for record in bases}
    adapted = select(evaluations, model=model, method=method) if bases else []
    return [(by_seed.get(record.seed, bases[0]), record) for record in adapted]


def gain(evaluations: list[Evaluation], model: str, method: str, group: str) -> Measure | None:
    """Average of a task group with the method, less the base model's.

    Paired by item where all of the group's tasks were scored; else from the averages and their
    standard errors, as if the two models had been scored on separate items.
    None where neither model scores at all: at the floor there is nothing to gain or lose.
    """
    pairs = [
        pair
        for pair in base_pairs(evaluations, model, method)
        if all(group in record.averages for record in pair)
    ]
    if not any(record.averages[group].value for pair in pairs for record in pair):
        return None
    used = fingerprints(record for pair in pairs for record in pair)
    strata = _group_strata(pairs, group)
    if strata is not None:
        return Measure(model, statistics.paired_difference(strata), used)
    averages = [[pair[side].averages[group] for pair in pairs] for side in (0, 1)]
    runs = [
        Runs(np.array([[one.value for one in side]]), np.array([[one.stderr for one in side]]))
        for side in averages
    ]
    return Measure(model, statistics.summary_difference(*runs, items=0), used)


def _group_strata(pairs: list[tuple[Evaluation, Evaluation]], group: str) -> list[Paired] | None:
    """Item scores of every task of a group, or None if the records cannot be paired by item."""
    adapted = pairs[0][1]
    tasks = {"target": list(adapted.target_tasks.values()), **adapted.groups}.get(group)
    return _stacked(
        [[pair[side].tasks.get(task) for pair in pairs] for side in (0, 1)] for task in tasks or ()
    )


def _stacked(strata: Iterable[Sequence[Sequence[Score | None]]]) -> list[Paired] | None:
    """Item scores as [S, I] arrays, from one score a seed of (baseline, treatment) by stratum.

    None unless there is a stratum, and the scores of each have the same items.
    """
    stacked = []
    for sides in strata:
        lengths = {len(score.per_item) if score else 0 for side in sides for score in side}
        if len(lengths) != 1 or 0 in lengths:
            return None
        arrays = (np.array([score.per_item for score in side], dtype=float) for side in sides)
        stacked.append(Paired(*arrays))
    return stacked or None


def ablation_strata(
    ablations: list[Ablation], intervention: str, domains: Sequence[str] = ()
) -> list[Paired] | None:
    """(intact, intervened) item scores by domain; None where an intervention was not run."""
    records = [r for r in ablations if {INTACT, intervention} <= set(r.interventions)]
    return _stacked(
        [[r.interventions[name].get(domain) for r in records] for name in (INTACT, intervention)]
        for domain in domains or (records[0].domains if records else ())
    )


def drop(
    ablations: list[Ablation], intervention: str, domains: Sequence[str] = ()
) -> Measure | None:
    """Percentage drop of the mean score over domains under an intervention, against intact.

    Args:
        ablations: of one model and method, one record a seed.
        domains: all of the records' unless some are given.
    """
    strata = ablation_strata(ablations, intervention, domains)
    if strata is None:
        return None
    return Measure(intervention, statistics.paired_drop(strata), fingerprints(ablations))


def drop_advantage(
    ablations: list[Ablation], controls: Sequence[str], spared: str
) -> Measure | None:
    """How much more the controls cut, on average, than ``spared`` does, in percentage points."""
    first = [ablation_strata(ablations, control) for control in controls]
    first = [strata for strata in first if strata is not None]
    second = ablation_strata(ablations, spared)
    if not first or second is None:
        return None
    interval = statistics.paired_drop_difference(first, second)
    return Measure(f"controls less {spared}", interval, fingerprints(ablations))


def dose_drops(ablations: list[Ablation], intervention: str) -> dict[float, Measure | None]:
    """{strength: `drop`} at every strength below 1 that was run, rising."""
    at: dict[float, list[Ablation]] = {}
    for record in ablations:
        for strength, scores in record.doses.get(intervention, {}).items():
            changed = {INTACT: record.interventions[INTACT], intervention: scores}
            at.setdefault(strength, []).append(replace(record, interventions=changed))
    return {strength: drop(at[strength], intervention) for strength in sorted(at)}


def retrained_drop(
    evaluations: list[Evaluation], record_of: dict[int, Evaluation]
) -> Interval | None:
    """Percentage drop of the mean target score of retrained controls, against intact ones.

    Args:
        evaluations: without an intervention, of one model and method.
        record_of: {seed: evaluation of the retrained control}, of one intervention.
    """
    pairs = [(r, record_of[r.seed]) for r in evaluations if r.seed in record_of]
    strata = _group_strata(pairs, "target") if pairs else None
    return statistics.paired_drop(strata) if strata else None
