"""How a claim's verdict is reached from intervals, and whether another study would reach it again.

Shapes: M effects, S replicates, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from steerlora.evaluation.statistics import Interval, t_quantile

IN_RANGE = "in range"
DIRECTION = "direction reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"
PARTLY = "partly measured"
NOT_MEASURED = "not measured"
NO_VERDICT = "no verdict"

LEAST_AGAIN = 0.9
"""A verdict stands if another study of the same size reaches it with this probability."""
LEAST_REPLICATES = 3
"""Intervals of fewer decide nothing: in ``results/calibration`` the intervals of other studies
confirmed 57 % of the verdicts of studies of two, 89 % of three, and 94 to 96 % from four on."""
DRAWS = 10_000
LEAST_SHARE = 0.1
"""The smallest effect that counts, as a share of the one that the paper's figure implies: less,
however sure it is, is not the effect that the paper reports."""

MEANINGS = {
    IN_RANGE: "every 95 % interval lies wholly above the smallest effect that counts, and all "
    "meet the paper's range",
    DIRECTION: "every 95 % interval lies wholly above the smallest effect that counts",
    NOT_REPRODUCED: "some interval lies wholly below the effect that the paper's figure implies, "
    "and not wholly above the smallest that counts",
    UNDECIDED: "none of these, or one replicate or two, which are too few, or another study of the "
    f"same size would decide alike with a probability below {LEAST_AGAIN} (Again)",
    PARTLY: "some of what the claim names was not measured, so the rest decides nothing",
    NOT_MEASURED: "there is no effect to measure",
    NO_VERDICT: "the run is marked as not meaningful",
}
"""{verdict: what it says}."""
VERDICTS = tuple(MEANINGS)

RULE = (
    "Each effect has a direction, which the claim says is positive. The smallest effect that "
    f"counts is {LEAST_SHARE} of the one that the paper's figure implies, the low end of its "
    "range. Where a claim is about several models or interventions, all must satisfy it. "
    "Intervals are over replicates: everything made anew from another seed, the items the same. "
    "Replicates that all agree on a value other than zero do so by the grid of the items' scores; "
    "nothing is decided by an interval of no width. "
    "Again is the probability that another study of the same size would decide alike. "
    "C3, C5 and C8 say in their definition what takes the place of the effect and of the range."
)


class Judged(NamedTuple):
    """A verdict, and what it comes from."""

    by_intervals: str = NOT_MEASURED
    """What the intervals alone say."""
    again: float = math.nan
    """Probability that those of another study of this size say so too, where "in range" and
    "direction reproduced" are the same; NaN where they decide nothing."""
    replicates: int = 0
    """The fewest of an effect."""
    whole: bool = True
    """Whether everything that the claim names was measured."""

    @property
    def verdict(self) -> str:
        """What the intervals say, if they are of everything that the claim names, and another
        study would say it again; else `PARTLY` or `UNDECIDED`."""
        if self.by_intervals in (NOT_MEASURED, NO_VERDICT):
            return self.by_intervals
        if not self.whole:
            return PARTLY
        return UNDECIDED if self.again < LEAST_AGAIN else self.by_intervals


def judge(
    effects: Sequence[Interval], *, smallest: float, agrees: bool, whole: bool = True
) -> Judged:
    """The verdict on a claim.

    Args:
        effects: intervals that the claim says are positive.
        smallest: effect that the paper's figure implies; `LEAST_SHARE` of it counts.
        agrees: whether the figures also agree with the paper's.
        whole: whether the effects are all that the claim names.
    """
    said = verdict(effects, smallest=smallest, agrees=agrees)
    decided = said not in (UNDECIDED, NOT_MEASURED)
    return Judged(
        said,
        again(effects, smallest=smallest) if decided else math.nan,
        min((effect.seeds for effect in effects), default=0),
        whole,
    )


def verdict(effects: Sequence[Interval], *, smallest: float, agrees: bool) -> str:
    """What the intervals alone say; the arguments of `judge`."""
    if not effects or any(math.isnan(effect.value) for effect in effects):
        return NOT_MEASURED
    low, high = np.array([_telling(effect)[1:3] for effect in effects]).T
    reproduced, refuted = _decided(low, high, smallest)
    if reproduced:
        return IN_RANGE if agrees else DIRECTION
    return NOT_REPRODUCED if refuted else UNDECIDED


def _telling(effect: Interval) -> Interval:
    """The interval; with unknown bounds if it is of too few replicates, or has no width and lies
    elsewhere than on zero."""
    if effect.seeds < LEAST_REPLICATES:
        return effect._replace(low=math.nan, high=math.nan)
    if abs(effect.value) > 1e-12 and effect.high - effect.low <= 1e-9 * abs(effect.value):
        return effect._replace(low=math.nan, high=math.nan)
    return effect


def _decided(low: np.ndarray, high: np.ndarray, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """(reproduced, refuted) of bounds [M, ...]; unknown ones, NaN, decide nothing."""
    counts = low > LEAST_SHARE * smallest
    return counts.all(axis=0), (~counts & (high < smallest)).any(axis=0)


def again(effects: Sequence[Interval], *, smallest: float) -> float:
    """Probability that another study of the same size decides as these intervals do.

    Predictive simulation under the normal model with the reference prior (Box & Tiao 1973, section
    2.4): ``sigma^2 ~ (S - 1) s^2 / chi^2_{S-1}``, ``mu ~ N(mean, sigma^2 / S)``, then S replicates
    of ``N(mu, sigma^2)``, by their mean and variance, and the rule. Effects count as independent.

    Args:
        effects: whose intervals are known decide; the others never do in another study either.
    """
    value, low, high, seeds, _ = np.array([_telling(effect) for effect in effects]).T
    error = (high - low) / 2 / t_quantile(seeds)  # s / sqrt(S)
    sigma, normal, spread = _draws(tuple(seeds.astype(int).tolist()))
    sigma = error[:, None] * sigma  # of the mean of S replicates
    middle = value[:, None] + sigma * normal
    half = t_quantile(seeds)[:, None] * sigma * spread
    reproduced, refuted = _decided(middle - half, middle + half, smallest)
    first = _decided(low, high, smallest)[0]
    return float(np.mean(reproduced if first else refuted))


@cache
def _draws(seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `again` draws for effects of S replicates each, [M, D]: sigma over s, the mean of the
    new study less the old one's over sigma / sqrt(S), and the new study's s over sigma."""
    generator = np.random.default_rng(0)
    free = np.maximum(np.array(seeds)[:, None] - 1, 1)
    old, new = (generator.chisquare(free, (len(seeds), DRAWS)) for _ in range(2))
    # mu and the new mean each miss by sigma / sqrt(S).
    normal = math.sqrt(2) * generator.standard_normal((len(seeds), DRAWS))
    return np.sqrt(free / old), normal, np.sqrt(new / free)


def overlaps(interval: Interval, low: float, high: float) -> bool:
    """Whether an interval and the paper's range have a point in common."""
    return interval.low <= high and interval.high >= low
