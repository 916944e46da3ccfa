"""All records of an experiment on sparse units, and the effects that its claims are about.

S replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from steerlora.evaluation.records import DomainSequence, Evaluation
from steerlora.evaluation.units import UnitsRecord
from steerlora.reporting.effects import Measure, fingerprints, select
from steerlora.reporting.sequences import reduction

TARGET = "target"
ROLES = (
    *("sparse", "lora", "lora_narrow", "specialists", "wide", "timed", "dense", "threshold"),
    *("static", "chosen", "random", "shuffled", "random_evaluation", "shuffled_evaluation"),
    *("frozen", "sae", "protected"),
)
"""Parts that methods play in the claims; ``study.settings.roles`` says which method plays which."""


class UnitStudy(NamedTuple):
    """What was measured."""

    roles: Mapping[str, str]
    """{part: method}."""
    evaluations: Sequence[Evaluation]
    sequentials: Sequence[DomainSequence]
    units: Sequence[UnitsRecord]

    def advantage(self, label: str, one: str, other: str) -> Measure | None:
        """Mean target score of one part's method less another's, in the replicates of both."""
        sides = [
            {record.seed: record for record in select(self.evaluations, method=self.roles[part])}
            for part in (one, other)
            if part in self.roles
        ]
        seeds = sorted(set.intersection(*map(set, sides))) if len(sides) == 2 else []
        if not seeds:
            return None
        pairs = [[side[seed].averages[TARGET] for side in sides] for seed in seeds]
        used = [side[seed] for seed in seeds for side in sides]
        tasks = used[0].target_tasks.values()
        return Measure(
            label,
            tuple(seeds),
            tuple(ours.value - theirs.value for ours, theirs in pairs),
            None,
            tuple((ours.stderr**2 + theirs.stderr**2) ** 0.5 for ours, theirs in pairs),
            sum(used[0].tasks[task].items for task in tasks if task in used[0].tasks),
            fingerprints(used),
        )

    def of_units(
        self, label: str, read: Callable[[UnitsRecord], float], training: str = "joint"
    ) -> Measure | None:
        """A figure of the units of ``sparse``, in every replicate."""
        found = select(self.units, method=self.roles.get("sparse"), training=training)
        if not found:
            return None
        return Measure(
            label,
            tuple(record.seed for record in found),
            tuple(read(record) for record in found),
            None,
            (0.0,) * len(found),
            0,
            fingerprints(found),
        )

    def less_forgetting(self, one: str, other: str) -> Measure | None:
        """Percentage by which one part's method forgets less than another's."""
        if one not in self.roles or other not in self.roles:
            return None
        return reduction(list(self.sequentials), self.roles[one], self.roles[other])
