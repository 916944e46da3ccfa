"""From records of splicing to shares of the gap, by condition and replicate.

Shapes: S replicates, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from steerlora.evaluation.splicing import BASE, METHOD, SAES, Share, Splicing, share_closed
from steerlora.reporting.effects import Measure


class Study(NamedTuple):
    """All records of an experiment."""

    records: dict[str, dict[int, Splicing]]
    """{condition: {seed: record}}."""
    references: Mapping[str, str]
    """{condition: the one whose SAEs leave the gap that its share is of}; else its own."""

    @classmethod
    def of(cls, records: Sequence[Splicing], references: Mapping[str, str]) -> Study:
        found: dict[str, dict[int, Splicing]] = {}
        for record in records:
            found.setdefault(record.condition, {})[record.seed] = record
        return cls(found, references)

    def share(self, condition: str, seed: int) -> Share | None:
        """The share of the gap in cross-entropy that a condition closes in a replicate.

        None where it or its reference is missing, or the gap means nothing.
        """
        own = self.records.get(condition, {}).get(seed)
        reference = self.records.get(self.references.get(condition, condition), {}).get(seed)
        if own is None or reference is None:
            return None
        losses = (
            reference.losses[BASE].cross_entropy,
            reference.losses[SAES].cross_entropy,
            own.losses[METHOD].cross_entropy,
        )
        share = share_closed(*losses)
        return share if share.means_something else None

    def shares(self, condition: str) -> dict[int, Share]:
        """{seed: share}, of the replicates that have one."""
        found = {seed: self.share(condition, seed) for seed in self.records.get(condition, {})}
        return {seed: share for seed, share in sorted(found.items()) if share is not None}

    def too_small(self) -> list[str]:
        """``<condition> seed <seed>`` of the gaps that mean nothing."""
        return [
            f"{condition} seed {seed}"
            for condition, found in self.records.items()
            if self.references.get(condition, condition) in self.records
            for seed in found
            if self.share(condition, seed) is None
        ]

    def measure(self, label: str, condition: str) -> Measure | None:
        """Percent of the gap that a condition closes: the ratio of two means over replicates."""
        found = self.shares(condition)
        if not found:
            return None
        return self._measure(
            label,
            [condition],
            {seed: 100 * share.value * share.gap for seed, share in found.items()},
            {seed: share.gap for seed, share in found.items()},
        )

    def difference(self, label: str, plus: Sequence[str], minus: Sequence[str]) -> Measure | None:
        """Sum of some conditions' shares less that of others, in points, replicate by replicate."""
        found = {name: self.shares(name) for name in (*plus, *minus)}
        seeds = set.intersection(*(set(shares) for shares in found.values()))
        values = {
            seed: 100
            * (
                sum(found[name][seed].value for name in plus)
                - sum(found[name][seed].value for name in minus)
            )
            for seed in sorted(seeds)
        }
        return self._measure(label, [*plus, *minus], values) if values else None

    def figures(
        self, label: str, conditions: Sequence[str], values: Mapping[int, float]
    ) -> Measure | None:
        """One number a replicate that some conditions' records give."""
        return self._measure(label, conditions, values) if values else None

    def _measure(
        self,
        label: str,
        conditions: Sequence[str],
        values: Mapping[int, float],
        below: Mapping[int, float] | None = None,
    ) -> Measure:
        records = [self.records[name][seed] for name in conditions for seed in values]
        return Measure(
            label=label,
            seeds=tuple(values),
            numerator=tuple(values.values()),
            denominator=None if below is None else tuple(below.values()),
            item_errors=(0.0,) * len(values),
            items=len(records[0].tokens),
            fingerprints=tuple(dict.fromkeys(record.fingerprint for record in records)),
        )


def flops_to_reach(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """FLOPs at which a training reaches a loss, by straight lines between its points.

    Args:
        points: (FLOPs, loss) of trainings of growing length, the untrained first.
        loss: to reach.

    Returns:
        None where the loss lies outside the points'.
    """
    for (before, high), (after, low) in pairwise(points):
        if low <= loss <= high and low < high:
            return before + (after - before) * (high - loss) / (high - low)
    return None
