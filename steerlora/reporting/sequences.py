"""From records of sequential adaptation to effects with intervals. A *run* is an (order, seed).

Orders are the same in every replicate, so what a replicate has is the mean over its orders. Shapes:
T stages, S replicates.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from steerlora.evaluation.forgetting import (
    positive_forgetting,
    positive_forgetting_stderr,
    score_matrix,
)
from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import paired_test
from steerlora.reporting.effects import Measure, fingerprints, mean_of, select

Read = Callable[[DomainSequence], Estimate]
"""From a record to a number of its run."""


def ordered(record: DomainSequence) -> tuple[np.ndarray, ...]:
    """A record's scores and standard errors, [T + 1, T], columns in the order of learning."""
    return tuple(
        score_matrix(matrix, sequence=record.sequence, domains=record.domains)
        for matrix in (record.matrix, record.stderr)
    )


def forgotten(record: DomainSequence) -> Estimate:
    """Positive forgetting of a run."""
    scores, stderr = ordered(record)
    return Estimate(positive_forgetting(scores), positive_forgetting_stderr(scores, stderr))


def final(record: DomainSequence) -> Estimate:
    """Average score of all domains after the last stage of a run."""
    scores, stderr = ordered(record)
    return mean_of([Estimate(*domain) for domain in zip(scores[-1], stderr[-1], strict=True)])


def broad_first(record: DomainSequence) -> bool:
    """Whether the broad domain comes before every narrower one."""
    return record.sequence[0] == record.broad


def apart_by_replay(sequentials: Sequence[DomainSequence]) -> list[DomainSequence]:
    """The records, those with replay under a name of their own where the method has both kinds."""
    ratios = {(record.model, record.method, record.replay) for record in sequentials}
    kinds = Counter((model, method) for model, method, _ in ratios)
    return [
        replace(record, method=f"{record.method} replay {record.replay:g}")
        if record.replay and kinds[record.model, record.method] > 1
        else record
        for record in sequentials
    ]


def by_replicate(records: Iterable[DomainSequence], read: Read) -> dict[int, Estimate]:
    """{seed: mean over its orders, with the error of its items, which its orders share}."""
    found: dict[int, list[Estimate]] = defaultdict(list)
    for record in records:
        found[record.seed].append(read(record))
    return {
        seed: Estimate(
            sum(run.value for run in runs) / len(runs), sum(run.stderr for run in runs) / len(runs)
        )
        for seed, runs in sorted(found.items())
    }


def mean(records: Sequence[DomainSequence], read: Read) -> Measure | None:
    """Mean over the runs of one method."""
    if not records:
        return None
    found = by_replicate(records, read)
    return Measure(
        records[0].method,
        tuple(found),
        tuple(estimate.value for estimate in found.values()),
        None,
        tuple(estimate.stderr for estimate in found.values()),
        _items(records),
        fingerprints(records),
    )


def kept(records: Sequence[DomainSequence]) -> Measure | None:
    """General knowledge after a sequence as a share of the base model's; one method's runs."""
    known = [record for record in records if record.general]
    if not known:
        return None
    before = by_replicate(known, lambda record: record.general.before)
    after = by_replicate(known, lambda record: record.general.after)
    return _share(known[0].method, before, after, known)


def ratio(
    sequentials: list[DomainSequence], method: str, baseline: str, read: Read
) -> Measure | None:
    """A method's mean as a share of the baseline's, over the runs that both have."""
    own, others = _shared(sequentials, method, baseline)
    if not own:
        return None
    sides = (by_replicate(side, read) for side in (others, own))
    return _share(f"{method} against {baseline}", *sides, select([*others, *own]))


def reduction(sequentials: list[DomainSequence], method: str, baseline: str) -> Measure | None:
    """Percentage by which a method lowers mean positive forgetting, over runs that both have.

    Args:
        sequentials: of one model.
    """
    share = ratio(sequentials, method, baseline, forgotten)
    if share is None:
        return None
    lowered = zip(share.denominator, share.numerator, strict=True)
    return share._replace(
        numerator=tuple(100 * (other - own) for other, own in lowered),
        item_errors=tuple(100 * error for error in share.item_errors),
    )


def _share(
    label: str,
    before: dict[int, Estimate],
    after: dict[int, Estimate],
    records: Sequence[DomainSequence],
) -> Measure:
    """``after / before`` of the same replicates, which count as independent in their items."""
    sides = [(before[seed], after[seed]) for seed in before]
    errors = [
        math.hypot(own.stderr, own.value / base.value * base.stderr) / base.value
        if base.value > 0
        else math.nan
        for base, own in sides
    ]
    return Measure(
        label,
        tuple(before),
        tuple(own.value for _, own in sides),
        tuple(base.value for base, _ in sides),
        tuple(errors),
        _items(records),
        fingerprints(records),
    )


def p_value(sequentials: list[DomainSequence], method: str, baseline: str, read: Read) -> float:
    """Of a paired t-test over replicates, on the runs that both methods have; NaN below two."""
    own, others = (
        np.array([estimate.value for estimate in by_replicate(side, read).values()])
        for side in _shared(sequentials, method, baseline)
    )
    return paired_test(own - others)


def _shared(
    sequentials: Iterable[DomainSequence], method: str, baseline: str
) -> tuple[list[DomainSequence], list[DomainSequence]]:
    """The records of the runs that both methods have, run by run."""
    sides = [
        {(r.order, r.seed): r for r in sequentials if r.method == name}
        for name in (method, baseline)
    ]
    runs = sorted(sides[0].keys() & sides[1].keys(), key=lambda run: (run[1], run[0]))
    return [sides[0][run] for run in runs], [sides[1][run] for run in runs]


def _items(records: Iterable[DomainSequence]) -> int:
    return max(record.items for record in records)


class Twins(NamedTuple):
    """What it changes to move the broad domain to the front of an order; one method."""

    first: float
    """Mean positive forgetting with the broad domain first."""
    later: float
    """The same with the broad domain where the order has it."""
    difference: Measure
    """``first - later``; negative: coming first lessens forgetting."""
    p: float
    """Of a paired t-test over replicates."""
    pairs: int
    """How many (order, twin, seed) there are."""
    orders: int
    """How many orders have a twin."""


def twins(records: Sequence[DomainSequence]) -> Twins | None:
    """Compare every order with its twin: the broad domain first, then the same order of the rest.

    Args:
        records: of one model and method. Pairs have the same seed.
    """
    by_run = {(tuple(record.sequence), record.seed): record for record in records}
    pairs = []
    for (sequence, seed), record in by_run.items():
        broad = record.broad
        if broad is None:
            continue
        front = (broad, *(domain for domain in sequence if domain != broad))
        if sequence != front and (front, seed) in by_run:
            pairs.append((record, by_run[front, seed]))
    if not pairs:
        return None
    later, first = (by_replicate([pair[side] for pair in pairs], forgotten) for side in (0, 1))
    records = [record for pair in pairs for record in pair]
    difference = Measure(
        records[0].method,
        tuple(first),
        tuple(first[seed].value - later[seed].value for seed in first),
        None,
        tuple(math.hypot(first[seed].stderr, later[seed].stderr) for seed in first),
        _items(records),
        fingerprints(records),
    )
    return Twins(
        float(np.mean([estimate.value for estimate in first.values()])),
        float(np.mean([estimate.value for estimate in later.values()])),
        difference,
        paired_test(difference.numerator),
        len(pairs),
        len({record.order for record, _ in pairs}),
    )
