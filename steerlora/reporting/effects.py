"""From score records to effects with intervals: gains, and drops under interventions.

A score record is the JSON object that a stage writes for one ``model``, ``adapter`` ("none" is the
base model) and ``seed``, with the ``fingerprint`` of its artifact and the ``domains``:

- evaluation: ``tasks`` {task: value, stderr, items, per_item}, ``averages`` {group: value, stderr}
  and ``routing`` (`RoutingHealth.result` or null); optional ``groups`` {group: tasks} and
  ``target_tasks`` {domain: task}, without which gains are not paired by item; ``intervention`` and
  ``phase`` ("training": trained under it too); ``routing_by_site`` {site: result} and
  ``routing_history`` [step and `RoutingHealth.summary`];
- ablation: ``interventions`` {name, "intact" among them: {domain: value, stderr, per_item}};
  optional ``doses`` {name: {strength below 1: the same}};
- sequential: see `steerlora.reporting.sequences`.

``score_name`` and ``score_unit`` may say what the scores are. Every function here takes a list of
records and returns a `Measure`, or None where those that it needs are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from steerlora.evaluation import statistics
from steerlora.evaluation.statistics import Interval, Paired, Runs
from steerlora.reporting.labels import BASE


class Measure(NamedTuple):
    """One effect: what it is of, its interval, and the artifacts it came from."""

    label: str
    interval: Interval
    fingerprints: tuple[str, ...]


def select(records: Iterable[dict], **where: object) -> list[dict]:
    """Records whose fields equal the given ones, by seed."""
    chosen = [r for r in records if all(r[key] == value for key, value in where.items())]
    return sorted(chosen, key=lambda record: record["seed"])


def uncontrolled(evaluations: Iterable[dict]) -> list[dict]:
    """Those of models as they are: neither evaluated nor trained under an intervention."""
    return [r for r in evaluations if r.get("intervention") in (None, "none")]


def retrained(evaluations: Iterable[dict]) -> list[dict]:
    """Those of adapters that were trained, and then evaluated, under an intervention."""
    return [r for r in evaluations if r.get("phase") == "training" and not uncontrolled([r])]


def fingerprints(records: Iterable[dict]) -> tuple[str, ...]:
    """The distinct fingerprints of some records, in their order."""
    return tuple(dict.fromkeys(record["fingerprint"] for record in records))


def base_pairs(evaluations: list[dict], model: str, adapter: str) -> list[tuple[dict, dict]]:
    """(base, adapted) evaluations of one model, seed by seed.

    A base model that was evaluated under one seed only stands beside every seed.
    """
    bases = select(evaluations, model=model, adapter=BASE)
    if not bases:
        return []
    by_seed = {record["seed"]: record for record in bases}
    adapted = select(evaluations, model=model, adapter=adapter)
    return [(by_seed.get(record["seed"], bases[0]), record) for record in adapted]


def gain(
    evaluations: list[dict], model: str, adapter: str, group: str, *, seed: int = 0
) -> Measure | None:
    """Average of a task group with the adapter, less the base model's.

    Paired by item where the records say which tasks make up the group (``groups``); else from the
    averages and their standard errors, as if the two models had been scored on separate items.
    None where neither model scores at all: at the floor there is nothing to gain or lose.
    """
    pairs = [
        pair
        for pair in base_pairs(evaluations, model, adapter)
        if all(record["averages"].get(group) is not None for record in pair)
    ]
    if not any(record["averages"][group]["value"] for pair in pairs for record in pair):
        return None
    used = fingerprints(record for pair in pairs for record in pair)
    strata = _group_strata(pairs, group)
    if strata is not None:
        return Measure(model, statistics.paired_difference(strata, seed=seed), used)
    runs = [
        Runs(
            *(
                np.array([[pair[side]["averages"][group][key] for pair in pairs]], dtype=float)
                for key in ("value", "stderr")
            )
        )
        for side in (0, 1)
    ]
    interval = statistics.summary_difference(*runs, items=0, seed=seed)
    return Measure(model, interval, used)


def task_groups(record: dict) -> dict[str, list[str]]:
    """Which tasks make up each average of an evaluation, as far as the record says."""
    return {"target": list(record.get("target_tasks", {}).values()), **record.get("groups", {})}


def _group_strata(pairs: list[tuple[dict, dict]], group: str) -> list[Paired] | None:
    """Item scores of every task of a group, or None if the records cannot be paired by item."""
    tasks = task_groups(pairs[0][1]).get(group)
    if not tasks:
        return None
    strata = []
    for task in tasks:
        sides = [
            [pair[side]["tasks"].get(task, {}).get("per_item") for pair in pairs] for side in (0, 1)
        ]
        stratum = _stacked(*sides)
        if stratum is None:
            return None
        strata.append(stratum)
    return strata


def _stacked(
    baseline: Sequence[list[float] | None], treatment: Sequence[list[float] | None]
) -> Paired | None:
    """Lists of item scores, one a seed, as [S, I] arrays; None unless all have the same length."""
    lengths = {len(scores) if scores else 0 for scores in [*baseline, *treatment]}
    if len(lengths) != 1 or 0 in lengths:
        return None
    return Paired(np.array(baseline, dtype=float), np.array(treatment, dtype=float))


def ablation_strata(
    ablations: list[dict], intervention: str, domains: Sequence[str]
) -> list[Paired] | None:
    """(intact, intervened) item scores by domain; None where an intervention was not run."""
    records = [r for r in ablations if {"intact", intervention} <= set(r["interventions"])]
    strata = []
    for domain in domains:
        cells = [
            [record["interventions"][name].get(domain, {}).get("per_item") for record in records]
            for name in ("intact", intervention)
        ]
        strata.append(_stacked(*cells) if records else None)
    return None if any(stratum is None for stratum in strata) else strata


def drop(
    ablations: list[dict], intervention: str, domains: Sequence[str], *, seed: int = 0
) -> Measure | None:
    """Percentage drop of the mean score over domains under an intervention, against intact.

    Args:
        ablations: of one model and adapter, one record a seed.
    """
    strata = ablation_strata(ablations, intervention, domains)
    if strata is None:
        return None
    interval = statistics.paired_drop(strata, seed=seed)
    return Measure(intervention, interval, fingerprints(ablations))


def drop_advantage(
    ablations: list[dict],
    controls: Sequence[str],
    spared: str,
    domains: Sequence[str],
    *,
    seed: int = 0,
) -> Measure | None:
    """How much more the controls cut, on average, than ``spared`` does, in percentage points."""
    first = [ablation_strata(ablations, control, domains) for control in controls]
    first = [strata for strata in first if strata is not None]
    second = ablation_strata(ablations, spared, domains)
    if not first or second is None:
        return None
    interval = statistics.paired_drop_difference(first, second, seed=seed)
    return Measure(f"controls less {spared}", interval, fingerprints(ablations))


def dose_strengths(ablations: list[dict]) -> dict[str, list[float]]:
    """{intervention: its strengths below 1, rising}, of those that were run at any."""
    found: dict[str, set[float]] = {}
    for record in ablations:
        for name, doses in record.get("doses", {}).items():
            found.setdefault(name, set()).update(map(float, doses))
    return {name: sorted(strengths) for name, strengths in found.items() if strengths}


def dose_drop(
    ablations: list[dict], intervention: str, strength: float, domains: Sequence[str]
) -> Measure | None:
    """As `drop`, at a strength below 1."""
    at_strength = [
        record
        | {"interventions": {"intact": record["interventions"]["intact"], intervention: dose}}
        for record in ablations
        for key, dose in record.get("doses", {}).get(intervention, {}).items()
        if float(key) == strength
    ]
    return drop(at_strength, intervention, domains) if at_strength else None


def retrained_drop(evaluations: list[dict], record_of: dict[int, dict]) -> Measure | None:
    """Percentage drop of the mean target score of retrained controls, against intact adapters.

    Args:
        evaluations: of intact adapters: one model and adapter.
        record_of: {seed: evaluation of the retrained control}, of one intervention.
    """
    pairs = [(r, record_of[r["seed"]]) for r in evaluations if r["seed"] in record_of]
    strata = _group_strata(pairs, "target") if pairs else None
    if strata is None:
        return None
    used = fingerprints(record for pair in pairs for record in pair)
    return Measure("retrained", statistics.paired_drop(strata), used)
