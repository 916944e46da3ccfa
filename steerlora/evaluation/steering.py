"""Scores of steered answers, as AxBench gives them, with rules in place of a judge.

P prompts, F factors.

Each answer is graded 0, 1 or 2 for its concept, for what was asked, and for fluency; its score is
the harmonic mean of the three, 0 where one of them is 0 (Wu et al. 2025, arXiv 2501.17148). The
factor by which a way steers is chosen on some prompts, and its figures are of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steerlora.evaluation.records import OfOneRun

PARTS = ("concept", "instruction", "fluency")
BEST = 2
"""The highest grade."""
FLUENT, FORMED = 1 / 3, 1 / 20
"""Quantiles of unsteered answers' likelihood from which an answer has 2, and from which 1."""


def harmonic_mean(grades: Sequence[float]) -> float:
    """0 where one of them is 0."""
    return len(grades) / math.fsum(1 / grade for grade in grades) if all(grades) else 0.0


class Fluency(NamedTuple):
    """What likelihoods mean, in nats a token, by those of unsteered answers to like prompts."""

    fluent: float
    formed: float

    @classmethod
    def of(cls, unsteered: Sequence[float]) -> Fluency:
        """By the `FLUENT` and the `FORMED` quantile of unsteered answers."""
        return cls(*(float(q) for q in np.quantile(unsteered, (FLUENT, FORMED))))

    def grade(self, likelihood: float) -> int:
        """Grade of an answer that does not repeat itself."""
        return BEST if likelihood >= self.fluent else int(likelihood >= self.formed)


@dataclass(frozen=True, kw_only=True)
class SteeredConcept:
    """How far one concept is steered by one way."""

    concept: str
    f1: float | None
    """Calibrated, of what it steers by, on texts that did not choose it; None: it is no score of
    texts."""
    auroc: float | None
    """On the same texts."""
    candidate: int | None
    """Number of the latent, coordinate or component; None: it is none."""
    searched: list[float]
    """[F] mean score of each factor on the prompts that choose it; empty where nothing steers."""
    factor: float
    """That was chosen."""
    grades: dict[str, list[int]]
    """{part: [P]} of the answers to the other prompts, of all `PARTS`."""

    @property
    def scores(self) -> list[float]:
        """[P]"""
        return [harmonic_mean(of) for of in zip(*(self.grades[p] for p in PARTS), strict=True)]


@dataclass(frozen=True, kw_only=True)
class SteeringRecord(OfOneRun):
    """One way to steer, on every concept."""

    way: str
    """What steers."""
    concepts: tuple[SteeredConcept, ...]
    texts: int
    """Labelled texts of a concept, of which half choose and the others tell."""
    l0: float | None
    """Latents of the SAE that are active on a token of the texts; None: no SAE steers."""

    @property
    def score(self) -> float:
        """Mean over concepts of the mean over prompts."""
        return float(np.mean([np.mean(one.scores) for one in self.concepts]))

    def grade(self, part: str) -> float:
        """Mean of one part, from 0 to 2."""
        return float(np.mean([np.mean(one.grades[part]) for one in self.concepts]))

    def mean(self, name: str) -> float:
        """Mean over concepts of "f1", "auroc" or "factor"; NaN where it is none."""
        values = [getattr(one, name) for one in self.concepts]
        return math.nan if None in values else float(np.mean(values))


def best_factor(factors: Sequence[float], scores: Sequence[float]) -> float:
    """That with the highest mean score, [F]; of equal ones the smallest factor."""
    return max(zip(scores, (-f for f in factors), factors, strict=True))[2]
