"""From records of sequential adaptation to effects with intervals. A *run* is an (order, seed).

Shapes: T stages, O orders, S seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from steerlora.evaluation import statistics
from steerlora.evaluation.forgetting import (
    positive_forgetting,
    positive_forgetting_stderr,
    score_matrix,
)
from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import Interval, Runs
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


def mean(records: Sequence[DomainSequence], read: Read) -> Interval | None:
    """Mean over runs of one method, with its interval over orders, seeds and items."""
    if not records:
        return None
    return statistics.summary_mean(_grid(records, read), _items(records))


def kept(records: Sequence[DomainSequence]) -> Interval | None:
    """General knowledge after a sequence as a share of the base model's; one method's runs."""
    known = [record for record in records if record.general]
    if not known:
        return None
    before = _grid(known, lambda record: record.general.before)
    after = _grid(known, lambda record: record.general.after)
    return statistics.summary_ratio(before, after, _items(known))


def reduction(sequentials: list[DomainSequence], method: str, baseline: str) -> Measure | None:
    """Percentage by which a method lowers mean positive forgetting, over runs that both have.

    Args:
        sequentials: of one model.
    """
    return _compared(sequentials, method, baseline, forgotten, statistics.summary_reduction)


def ratio(
    sequentials: list[DomainSequence], method: str, baseline: str, read: Read
) -> Measure | None:
    """A method's mean as a share of the baseline's, over the runs that both have."""
    return _compared(sequentials, method, baseline, read, statistics.summary_ratio)


def p_value(sequentials: list[DomainSequence], method: str, baseline: str, read: Read) -> float:
    """Of a paired sign-flip test over the runs that both methods have; NaN below two."""
    one, other = _shared(sequentials, method, baseline)
    values = ([read(record).value for record in side] for side in (other, one))
    return statistics.paired_test(*values)


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


def _compared(
    sequentials: list[DomainSequence],
    method: str,
    baseline: str,
    read: Read,
    statistic: Callable[[Runs, Runs, int], Interval],
) -> Measure | None:
    own, others = _shared(sequentials, method, baseline)
    if not own:
        return None
    used = [*others, *own]
    interval = statistic(_grid(others, read), _grid(own, read), _items(used))
    return Measure(f"{method} against {baseline}", interval, fingerprints(select(used)))


def _grid(records: Iterable[DomainSequence], read: Read) -> Runs:
    """[O, S] values and errors of some records, by order and seed; NaN: no such run."""
    found = {(record.order, record.seed): read(record) for record in records}
    values = pd.Series({run: estimate.value for run, estimate in found.items()}).unstack()
    stderr = pd.Series({run: estimate.stderr for run, estimate in found.items()}).unstack()
    return Runs(*map(np.ascontiguousarray, (values, stderr.fillna(0.0))))


def _items(records: Iterable[DomainSequence]) -> int:
    return max(record.items for record in records)


class Twins(NamedTuple):
    """What it changes to move the broad domain to the front of an order; one method."""

    first: float
    """Mean positive forgetting with the broad domain first."""
    later: float
    """The same with the broad domain where the order has it."""
    difference: Interval
    """``first - later``; negative: coming first lessens forgetting."""
    p: float
    """Of a paired sign-flip test over the pairs."""
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
    later, first = [], []
    for (sequence, seed), record in by_run.items():
        broad = record.broad
        front = (broad, *(domain for domain in sequence if domain != broad))
        if sequence != front and (front, seed) in by_run:
            later.append(record)
            # Under the name of its twin: the pair is one order of the comparison.
            first.append(replace(by_run[front, seed], order=record.order))
    if not later:
        return None
    values = [[forgotten(record).value for record in side] for side in (later, first)]
    return Twins(
        float(np.mean(values[1])),
        float(np.mean(values[0])),
        statistics.summary_difference(
            _grid(later, forgotten), _grid(first, forgotten), _items(later)
        ),
        statistics.paired_test(*values),
        len(later),
        len({record.order for record in later}),
    )
