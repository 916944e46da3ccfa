"""Routing health of a run over the whole of its training, and which runs have it."""

from __future__ import annotations

from typing import NamedTuple

from steerlora.evaluation.records import Evaluation, RoutingSummary
from steerlora.reporting.effects import by_method
from steerlora.reporting.methods import Methods


class OverTraining(NamedTuple):
    """Routing health at every measurement of a training, and at the evaluation after it."""

    usage_entropy: float
    """Mean over all of them, in units of log E."""
    first_entropy: float
    """At the first measurement."""
    lowest_entropy: float
    """The least of all."""
    last_entropy: float
    """At evaluation."""
    died: bool
    """Whether a specialist was dead at any of them but the first."""
    max_load: float
    """The largest."""
    measurements: int
    """How many there are, the evaluation included."""


def over_training(*records: Evaluation) -> list[OverTraining]:
    """Of some evaluations that are to be compared.

    Where one of them has no history of its training, none of them is given one: an average over
    training beside a value at its end would compare nothing.
    """
    whole = all(record.routing_history for record in records)
    return [_of([*(record.routing_history if whole else ()), record.routing]) for record in records]


def _of(measured: list[RoutingSummary]) -> OverTraining:
    entropy = [at.usage_entropy for at in measured]
    later = measured[1:] or measured
    return OverTraining(
        usage_entropy=sum(entropy) / len(entropy),
        first_entropy=entropy[0],
        lowest_entropy=min(entropy),
        last_entropy=entropy[-1],
        died=any(at.dead_specialists > 0 for at in later),
        max_load=max(at.max_load for at in measured),
        measurements=len(measured),
    )


def routed(
    evaluations: list[Evaluation], model: str, methods: Methods
) -> dict[str, list[Evaluation]]:
    """{method: its evaluations on a model}, of methods that route."""
    return by_method([record for record in evaluations if record.routing], model, methods)
