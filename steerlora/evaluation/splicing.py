"""What a model loses with SAEs in place of its streams, and how much of it is won back.

Shapes: N rows of text, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from steerlora.evaluation.records import OfOneRun
from steerlora.evaluation.scores import Estimate

BASE, SAES, METHOD, ADAPTER = WAYS = ("base", "saes", "method", "adapter")
"""Ways to run a model: as it was; with the SAEs alone; with what was trained around them as well;
and with what was trained alone."""
LEAST_GAP = 5.0
"""Standard errors that a gap must have for a share of it to mean anything."""
DRAWS = 4000
"""Resamplings of the rows."""


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Next-token losses of one way to run a model, in nats, each summed over a row."""

    cross_entropy: list[float]
    """[N]"""
    kl: list[float]
    """[N] KL(base || this way)."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream of one way to run a model beside the base's: means over tokens that carry a
    signal."""

    distance: float
    """E |x - x_base| / E |x_base|."""
    cosine: float
    """E cos(x, x_base)."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The features of one SAE."""

    l0: float
    """Active latents of a token."""
    alive: float
    """Share of the latents that are active on any token, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training took."""

    tokens: float = 0.0
    flops: float = 0.0
    """Model FLOPs, by the formulas of `steerlora.lm.flops`."""
    seconds: float = 0.0
    """Of the steps, on the machine that ran them."""


@dataclass(frozen=True, kw_only=True)
class Splicing(OfOneRun):
    """A model with SAEs in place of streams, and with what was trained around them."""

    condition: str
    """What was trained, in an experiment's words."""
    sites: tuple[int, ...]
    """Layers whose incoming streams are replaced."""
    tokens: list[int]
    """[N] predicted tokens of each row."""
    losses: dict[str, RowLosses]
    """{way: losses}, of all `WAYS`."""
    streams: dict[str, dict[int, Stream]]
    """{way: {layer: the stream that enters it}}, to layer L, which leaves the last; of `SAES` and
    `METHOD`."""
    latents: dict[str, dict[int, Latents]]
    """{way: {site: features}}, of `SAES` and `METHOD`."""
    scores: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """{way: {task: score}}; empty where no task was asked for."""
    parameters: int = 0
    """That were trained around the SAEs."""
    cost: Cost = Cost()
    """Of what was trained around the SAEs, and of the SAEs' training end to end."""

    def loss(self, way: str) -> float:
        """Cross-entropy in nats a token."""
        return math.fsum(self.losses[way].cross_entropy) / sum(self.tokens)

    def kl(self, way: str) -> float:
        """KL(base || way) in nats a token."""
        return math.fsum(self.losses[way].kl) / sum(self.tokens)


class Share(NamedTuple):
    """A share of a gap, with its 95 % interval over rows."""

    value: float
    low: float
    high: float
    gap: float
    """The whole gap, in nats a row."""
    gap_errors: float
    """The gap in units of its standard error."""

    @property
    def means_something(self) -> bool:
        """The gap has `LEAST_GAP` standard errors."""
        return self.gap_errors >= LEAST_GAP


def share_closed(
    base: ArrayLike, spliced: ArrayLike, method: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Share:
    """(L_spliced - L_method) / (L_spliced - L_base), of the sums over rows.

    The interval is the bootstrap's, percentile by percentile (Efron 1979): rows are drawn with
    replacement, numerator and denominator from the same draw.

    Args:
        base, spliced, method: [N] losses of the same rows; ``spliced`` with the SAEs alone.
        draws: how often they are drawn.
        seed: of the draws.
    """
    base, spliced, method = (np.asarray(one, np.float64) for one in (base, spliced, method))
    gap, closed = spliced - base, spliced - method
    count = len(gap)
    error = gap.std(ddof=1) / math.sqrt(count) if count > 1 else math.inf
    chosen = np.random.default_rng(seed).integers(0, count, (draws, count))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = closed[chosen].sum(1) / gap[chosen].sum(1)
        value, errors = closed.sum() / gap.sum(), gap.mean() / error
    low, high = np.nanquantile(ratios, (0.025, 0.975)) if gap.any() else (math.nan, math.nan)
    return Share(float(value), float(low), float(high), float(gap.mean()), float(errors))
