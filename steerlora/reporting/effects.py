"""From records to effects with intervals: gains, and drops under interventions.

Every function here takes records (`steerlora.evaluation.records`) and returns a `Measure`, or None
where those that it needs are not there. An effect is reduced to one number a replicate, or to the
two sides of a ratio, before anything is said of its error. Shapes: S replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from steerlora.evaluation.records import BASE, INTACT, Ablation, Evaluation, Record
from steerlora.evaluation.scores import Estimate, Score
from steerlora.evaluation.statistics import Interval, t_interval
from steerlora.reporting.methods import Methods


class Measure(NamedTuple):
    """One effect: what it is of, what it is in every replicate, and where it came from."""

    label: str
    seeds: tuple[int, ...]
    """The S replicates."""
    numerator: tuple[float, ...]
    """[S] numbers of which the effect is the mean, or the upper side of a ratio of means."""
    denominator: tuple[float, ...] | None
    """[S] of the lower side; None where the effect is a mean."""
    item_errors: tuple[float, ...]
    """[S] standard errors of every replicate's effect that come from its items."""
    items: int
    """How many items it rests on; 0 where they are not counted."""
    fingerprints: tuple[str, ...]
    """Of the artifacts that it came from."""

    @property
    def interval(self) -> Interval:
        """The effect with its 95 % interval over replicates."""
        return t_interval(self.numerator, self.denominator, items=self.items)


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
    """(base, adapted) evaluations of one model within every replicate.

    A base model with one evaluation, such as a published one, is that of every replicate.
    """
    bases = select(evaluations, model=model, method=BASE)
    by_seed = {record.seed: record for record in bases}
    only = bases[0] if len(bases) == 1 else None
    pairs = [
        (by_seed.get(record.seed, only), record)
        for record in select(evaluations, model=model, method=method)
    ]
    return [(base, adapted) for base, adapted in pairs if base is not None]


def gain(evaluations: list[Evaluation], model: str, method: str, group: str) -> Measure | None:
    """Average of a task group with the method, less the base model's in the same replicate.

    None where neither model scores at all: at the floor there is nothing to gain or lose.
    """
    pairs = [
        pair
        for pair in base_pairs(evaluations, model, method)
        if all(group in record.averages for record in pair)
    ]
    averages = [[record.averages[group] for record in pair] for pair in pairs]
    if not any(estimate.value for pair in averages for estimate in pair):
        return None
    scores = [_scores(pair, group) for pair in pairs]
    return Measure(
        model,
        tuple(adapted.seed for _, adapted in pairs),
        tuple(adapted.value - base.value for base, adapted in averages),
        None,
        tuple(
            item_error([(-1.0, before), (1.0, after)])
            if before
            else math.hypot(base.stderr, adapted.stderr)
            for (before, after), (base, adapted) in zip(scores, averages, strict=True)
        ),
        _items([side for pair in scores for side in pair]),
        fingerprints(record for pair in pairs for record in pair),
    )


def _scores(records: Sequence[Evaluation], group: str) -> list[list[Score]]:
    """Of every record, the scores of those tasks of a group that all of them have."""
    tasks = {"target": list(records[0].target_tasks.values()), **records[0].groups}.get(group, [])
    shared = [task for task in tasks if all(task in record.tasks for record in records)]
    return [[record.tasks[task] for task in shared] for record in records]


def _items(sides: Sequence[Sequence[Score]]) -> int:
    """Items of all tasks; 0 where one side does not know its tasks."""
    return min((sum(score.items for score in side) for side in sides), default=0)


def item_error(terms: Sequence[tuple[float, Sequence[Score]]]) -> float:
    """Standard error, from items, of a weighted sum of means over tasks.

    Task by task it is that of the items' weighted sums, so what conditions have in common cancels;
    where their items are not the same, conditions count as independent.

    Args:
        terms: (weight, scores of the K tasks) of every condition; the same tasks in all.
    """
    weights = [weight for weight, _ in terms]
    variances = []
    for scores in zip(*(scores for _, scores in terms), strict=True):
        if len({len(score.per_item) for score in scores}) == 1 and scores[0].per_item:
            summed = np.array(weights) @ np.array([score.per_item for score in scores])
            variances.append(summed.var(ddof=1) / len(summed) if len(summed) > 1 else 0.0)
        else:
            variances.append(
                sum((w * score.stderr) ** 2 for w, score in zip(weights, scores, strict=True))
            )
    return math.sqrt(sum(variances)) / len(variances)


def ablated(
    ablations: list[Ablation], names: Sequence[str], domains: Sequence[str] = ()
) -> tuple[list[Ablation], list[list[list[Score]]]]:
    """The records that ran all of some interventions on all of some domains, and their scores.

    Args:
        domains: all of each record's unless some are given.

    Returns:
        Records, and of each of them a list of scores by domain for every intervention.
    """
    records, scores = [], []
    for record in ablations:
        places = domains or record.domains
        runs = [record.interventions.get(name, {}) for name in names]
        if all(run.keys() >= set(places) for run in runs):
            records.append(record)
            scores.append([[run[place] for place in places] for run in runs])
    return records, scores


def drop(
    ablations: list[Ablation], intervention: str, domains: Sequence[str] = ()
) -> Measure | None:
    """Percentage drop of the mean score over domains under an intervention, against intact.

    Args:
        ablations: of one model and method, one record a replicate.
        domains: all of the records' unless some are given.
    """
    records, scores = ablated(ablations, (INTACT, intervention), domains)
    return _drop(intervention, records, scores, fingerprints(records))


def _drop(
    label: str,
    records: Sequence[Record],
    scores: Sequence[Sequence[Sequence[Score]]],
    used: tuple[str, ...],
) -> Measure | None:
    """Percentage drop from (before, after) scores by task of every replicate."""
    if not records:
        return None
    values = [[mean_of(side).value for side in sides] for sides in scores]
    errors = [
        100 / before * item_error([(-after / before, sides[0]), (1.0, sides[1])])
        if before > 0
        else math.nan
        for (before, after), sides in zip(values, scores, strict=True)
    ]
    return Measure(
        label,
        tuple(record.seed for record in records),
        tuple(100 * (before - after) for before, after in values),
        tuple(before for before, _ in values),
        tuple(errors),
        _items([side for sides in scores for side in sides]),
        used,
    )


def drop_advantage(
    ablations: list[Ablation], controls: Sequence[str], spared: str
) -> Measure | None:
    """How much more the controls cut, on average, than ``spared`` does, in percentage points.

    Both drops are from the same intact score, so their difference is one ratio to it. Controls
    that no replicate ran are left out.
    """
    run = [name for name in controls if any(name in r.interventions for r in ablations)]
    records, scores = ablated(ablations, (INTACT, spared, *run))
    if not run or not records:
        return None
    values = np.array([[mean_of(side).value for side in sides] for sides in scores])  # [S, 2 + C]
    intact, above = values[:, 0], 100 * (values[:, 1] - values[:, 2:].mean(axis=1))
    errors = []
    for before, points, sides in zip(intact, above, scores, strict=True):
        if before > 0:
            weights = [-points / before, 100.0, *[-100.0 / len(run)] * len(run)]
            errors.append(item_error(list(zip(weights, sides, strict=True))) / before)
        else:
            errors.append(math.nan)
    return Measure(
        f"controls less {spared}",
        tuple(record.seed for record in records),
        tuple(above.tolist()),
        tuple(intact.tolist()),
        tuple(errors),
        _items([side for sides in scores for side in sides]),
        fingerprints(records),
    )


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
) -> Measure | None:
    """Percentage drop of the mean target score of retrained controls, against intact ones.

    Args:
        evaluations: without an intervention, of one model and method.
        record_of: {seed: evaluation of the retrained control}, of one intervention.
    """
    pairs = [(r, record_of[r.seed]) for r in evaluations if r.seed in record_of]
    scores = [_scores(pair, "target") for pair in pairs]
    known = [place for place, sides in enumerate(scores) if all(sides)]
    return _drop(
        "retrained",
        [pairs[place][0] for place in known],
        [scores[place] for place in known],
        fingerprints(record for place in known for record in pairs[place]),
    )
