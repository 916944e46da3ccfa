"""From records of steering to effects, way by way and replicate by replicate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from steerlora.evaluation.steering import SteeringRecord
from steerlora.reporting.effects import Measure, fingerprints


class Study(NamedTuple):
    """All records of an experiment."""

    records: dict[str, dict[int, SteeringRecord]]
    """{way: {seed: record}}."""

    @classmethod
    def of(cls, records: Sequence[SteeringRecord]) -> Study:
        found: dict[str, dict[int, SteeringRecord]] = {}
        for record in records:
            found.setdefault(record.way, {})[record.seed] = record
        return cls(found)

    def figure(self, label: str, ways: Sequence[str], of: Callable[..., float]) -> Measure | None:
        """A number of some ways' records of one replicate, in the replicates that all have; None
        where there is none.

        Args:
            of: takes a record of each of the ways.
        """
        sides = [self.records.get(way, {}) for way in ways]
        seeds = sorted(set.intersection(*map(set, sides)))
        if not seeds:
            return None
        used = [[side[seed] for side in sides] for seed in seeds]
        return Measure(
            label=label,
            seeds=tuple(seeds),
            numerator=tuple(of(*records) for records in used),
            denominator=None,
            item_errors=(0.0,) * len(seeds),
            items=sum(len(one.scores) for one in used[0][0].concepts),
            fingerprints=fingerprints(record for records in used for record in records),
        )

    def score(self, way: str) -> Measure | None:
        """A way's own score."""
        return self.figure(way, [way], lambda record: record.score)

    def advantage(self, label: str, one: str, other: str, share: float = 1.0) -> Measure | None:
        """A way's score less a share of another's."""
        return self.figure(
            label, [one, other], lambda ours, theirs: ours.score - share * theirs.score
        )
