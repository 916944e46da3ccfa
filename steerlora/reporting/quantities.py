"""Every number that a report gives an interval of, for a calibration study to check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from steerlora.evaluation.records import BASE, INTACT, Ablation, DomainSequence, Evaluation
from steerlora.evaluation.scores import Estimate, Score
from steerlora.reporting import labels
from steerlora.reporting.claim_measures import CONTROLS, SPARED, measure_claims
from steerlora.reporting.effects import (
    Measure,
    by_method,
    dose_drops,
    drop,
    drop_advantage,
    fingerprints,
    gain,
    retrained,
    retrained_drop,
    select,
    uncontrolled,
)
from steerlora.reporting.methods import Methods
from steerlora.reporting.sequences import (
    broad_first,
    final,
    forgotten,
    kept,
    mean,
    ratio,
    reduction,
    twins,
)


class Quantity(NamedTuple):
    """A number of a report."""

    family: str
    """What kind of number it is."""
    label: str
    measure: Measure


def quantities(
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    *,
    main_model: str,
) -> list[Quantity]:
    """What `steerlora.reporting.report.write_report` gives an interval or an error of."""
    found = [
        *_of_evaluations(evaluations, methods),
        *_of_ablations(ablations, methods),
        *_of_retrained(evaluations),
        *_of_sequences(sequentials, methods),
    ]
    plain = uncontrolled(evaluations)
    collapse = measure_claims(plain, [], [], methods, main_model=main_model)[-1]
    found += [("usage entropy", measure.label, measure) for measure in collapse.measures]
    return [Quantity(*one) for one in found if one[2] is not None]


Found = Iterator[tuple[str, str, Measure | None]]


def _of_evaluations(evaluations: list[Evaluation], methods: Methods) -> Found:
    plain = uncontrolled(evaluations)
    for model in dict.fromkeys(record.model for record in plain):
        for method, records in by_method(plain, model, methods).items():
            name = f"{model} {methods.label(method)}"
            for group in labels.GROUPS:
                averages = [record.averages.get(group) for record in records]
                yield "score", f"{name} {group}", _mean(records, averages)
                if method != BASE:
                    yield "gain", f"{name} {group}", gain(plain, model, method, group)
            for domain in records[0].domains:
                scores = [r.tasks.get(r.target_tasks.get(domain)) for r in records]
                yield "score", f"{name} {domain}", _mean(records, scores)


def _mean(records: list[Evaluation], scores: Sequence[Estimate | Score | None]) -> Measure | None:
    """The mean of a score over the records that have it."""
    known = [pair for pair in zip(records, scores, strict=True) if pair[1] is not None]
    if not known:
        return None
    return Measure(
        "score",
        tuple(record.seed for record, _ in known),
        tuple(score.value for _, score in known),
        None,
        tuple(score.stderr for _, score in known),
        0,
        fingerprints(record for record, _ in known),
    )


def _of_ablations(ablations: list[Ablation], methods: Methods) -> Found:
    for model, method in dict.fromkeys((r.model, r.method) for r in ablations):
        records = select(ablations, model=model, method=method)
        names = dict.fromkeys(name for r in records for name in r.interventions if name != INTACT)
        for name in names:
            label = f"{model} {method} {name}"
            yield "drop", label, drop(records, name)
            for domain in records[0].domains:
                yield "drop", f"{label} {domain}", drop(records, name, [domain])
            for strength, measure in dose_drops(records, name).items():
                yield "drop", f"{label} {strength:g}", measure
        if method == methods.paper:
            advantage = drop_advantage(records, CONTROLS, SPARED)
            yield "drop", f"{model} {method} controls less {SPARED}", advantage


def _of_retrained(evaluations: list[Evaluation]) -> Found:
    plain, controls = uncontrolled(evaluations), retrained(evaluations)
    for model, method, name in dict.fromkeys((r.model, r.method, r.intervention) for r in controls):
        chosen = select(controls, model=model, method=method, intervention=name)
        beside = select(plain, model=model, method=method)
        measure = retrained_drop(beside, {record.seed: record for record in chosen})
        yield "drop", f"{model} {method} retrained {name}", measure


def _of_sequences(sequentials: list[DomainSequence], methods: Methods) -> Found:
    classes = {
        "all": sequentials,
        "broad_first": [record for record in sequentials if broad_first(record)],
        "other": [r for r in sequentials if r.broad is not None and not broad_first(r)],
    }
    for model in dict.fromkeys(record.model for record in sequentials):
        for part, records in classes.items():
            chosen = select(records, model=model)
            for method, own in by_method(chosen, model, methods).items():
                label = f"{model} {method} {part}"
                yield "forgetting", label, mean(own, forgotten)
                yield "final average", label, mean(own, final)
                yield "general kept", label, kept(own)
                if method != methods.baseline:
                    yield "reduction", label, reduction(chosen, method, methods.baseline)
        for method, own in by_method(sequentials, model, methods).items():
            label = f"{model} {method}"
            effect = twins(own)
            yield "order effect", label, effect and effect.difference
            if method != methods.baseline:
                share = ratio(select(sequentials, model=model), method, methods.baseline, final)
                yield "ratio", f"{label} final average", share
