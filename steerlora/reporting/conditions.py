"""Conditions: artifacts that differ in seeds alone; and which differences between them hold up.

Two conditions are compared within pairs of artifacts with equal seeds. With two or more such pairs
an effect is a mean over replicates, with Student's t interval and test: it says what other seeds
would give on these items. With one pair it is the difference of two means over evaluation items,
paired item by item where both were scored on the same, with the normal interval and test: it says
what other items would give to these two trained models, and nothing about other seeds. All p-values
of a comparison are adjusted together by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from steerlora.evaluation.statistics import Interval, holm, paired_test, t_interval
from steerlora.reporting.effects import item_error
from steerlora.reporting.run_figures import NORMAL, Figure, is_headline, scores_behind
from steerlora.reporting.run_rows import RunRow
from steerlora.reporting.settings import SEEDS, Setting

LEVEL = 0.05
"""Adjusted p-value below which a difference holds up."""


@dataclass(frozen=True)
class Condition:
    """Artifacts of one stage whose settings are the same but for seeds."""

    name: str
    """A capital letter, in the order in which they were given."""
    rows: tuple[RunRow, ...]
    """One a replicate."""

    @property
    def settings(self) -> dict[str, Setting]:
        """What all its artifacts have in common."""
        return shared(self.rows[0].settings)

    def replicates(self) -> dict[tuple, RunRow]:
        """{seeds: the artifact with them}."""
        return {tuple(row.settings.get(seed) for seed in SEEDS): row for row in self.rows}

    def figure(self, name: str) -> tuple[Figure | Interval | None, int]:
        """A figure with its interval, and the number of replicates that it is a mean over.

        With two or more, the interval is Student's t over them; of one, what its items say.
        """
        known = [row.figures[name] for row in self.rows if name in row.figures]
        if len(known) < 2:
            return (known[0] if known else None), len(known)
        return t_interval([figure.value for figure in known]), len(known)


class Difference(NamedTuple):
    """One figure of a condition less that of the first condition."""

    figure: str
    condition: str
    value: float
    low: float
    high: float
    """Ends of the 95 % interval; NaN: cannot be told."""
    replicates: int
    """Pairs with equal seeds; with one, the interval is over evaluation items."""
    p_value: float
    """Two-sided, adjusted by Holm's method over all differences; NaN: cannot be told."""

    @property
    def verdict(self) -> str:
        """Whether it holds up, in words."""
        if self.value == self.low == self.high == 0:
            return "none"
        if math.isnan(self.p_value):
            return "cannot be told"
        return "holds up" if self.p_value < LEVEL else "not shown"


def shared(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings less seeds, and less the names of artifacts, which differ with them."""
    return {
        key: value
        for key, value in settings.items()
        if key not in (*SEEDS, "fingerprint") and not key.startswith("upstream.")
    }


def conditions(rows: Sequence[RunRow]) -> list[Condition]:
    """The rows by condition, in the order in which they are given."""
    grouped: dict[tuple, list[RunRow]] = {}
    for row in rows:
        grouped.setdefault(tuple(sorted(shared(row.settings).items())), []).append(row)
    return [Condition(letter(number), tuple(own)) for number, own in enumerate(grouped.values())]


def letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    above, own = divmod(number, 26)
    return (letter(above - 1) if above else "") + chr(ord("A") + own)


def compared(several: Sequence[Condition]) -> list[str]:
    """The figures that a comparison shows: those for tables, and every domain's own."""
    names = dict.fromkeys(name for one in several for row in one.rows for name in row.figures)
    return [
        name
        for name in names
        if (is_headline(name) or name.startswith("target/")) and not name.startswith("throughput/")
    ]


def differences(several: Sequence[Condition]) -> list[Difference]:
    """Every figure of every condition less that of the first."""
    found = [
        difference
        for name in compared(several)
        for other in several[1:]
        if (difference := _difference(name, several[0], other))
    ]
    adjusted = holm([one.p_value for one in found])
    return [one._replace(p_value=float(p)) for one, p in zip(found, adjusted, strict=True)]


def _difference(name: str, first: Condition, other: Condition) -> Difference | None:
    """None where the two have no pair in which both measured the figure."""
    left, right = first.replicates(), other.replicates()
    pairs = [(left[seeds], right[seeds]) for seeds in left if seeds in right]
    pairs = [pair for pair in pairs if all(name in row.figures for row in pair)]
    if not pairs:
        return None
    values = np.array([b.figures[name].value - a.figures[name].value for a, b in pairs])
    if len(pairs) > 1:
        value, low, high, *_ = t_interval(values)
        return Difference(name, other.name, value, low, high, len(pairs), paired_test(values))
    error = _error_of_items(name, *pairs[0])
    half, p_value = NORMAL * error, math.nan
    if error > 0:
        p_value = float(2 * stats.norm.sf(abs(values[0]) / error))
    value = float(values[0])
    return Difference(name, other.name, value, value - half, value + half, 1, p_value)


def _error_of_items(name: str, first: RunRow, other: RunRow) -> float:
    """Standard error of the difference of a figure, from the items; NaN where there is none."""
    sides = [scores_behind(row.record, name) for row in (first, other)]
    items = [
        [(row.settings.get("upstream.domains"), len(score.per_item)) for score in side]
        for row, side in zip((first, other), sides, strict=True)
    ]
    if sides[0] and items[0] == items[1]:
        return item_error([(-1.0, sides[0]), (1.0, sides[1])])
    errors = [row.figures[name].stderr for row in (first, other)]
    return math.nan if None in errors else math.hypot(*errors)
