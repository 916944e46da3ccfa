"""Which features are general, which belong to a domain, and what a domain looks like in them.

T tokens, D domains, N latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steerlora.saes.sparse import SparseFeatures

TOKENS = 1024
"""Tokens whose features are compared at once, densely."""


class FeatureStatistics:
    """How often and how strongly each feature is active in each domain, token by token.

    Memory is D * N numbers, however long the text. Padding must be left out by the caller.

    Args:
        domains: D.
        latents: N.
    """

    def __init__(self, domains: int, latents: int) -> None:
        self.tokens = torch.zeros(domains, dtype=torch.float64)
        self._active = torch.zeros(domains, latents, dtype=torch.float64)
        self._total = torch.zeros(domains, latents, dtype=torch.float64)

    def update(self, features: SparseFeatures, domain: int) -> None:
        """Add the tokens of one domain, values and indices [T, K]."""
        indices, values = features.indices.flatten().cpu(), features.values.flatten().cpu().double()
        self._total[domain].index_add_(0, indices, values)
        self._active[domain].index_add_(0, indices, (values > 0).double())
        self.tokens[domain] += len(features.values)

    def frequency(self) -> Tensor:
        """Share of a domain's tokens in which a feature is active, [D, N]."""
        return self._active / self.tokens.clamp_min(1)[:, None]

    def mean(self) -> Tensor:
        """Mean activation over a domain's tokens, inactive ones as zero, [D, N]."""
        return self._total / self.tokens.clamp_min(1)[:, None]


class Taxonomy(NamedTuple):
    """Features sorted by use.

    Attributes:
        general: [N] bool, used often and alike in all domains.
        domain: [D, N] bool, used more in one domain than elsewhere; none of them general.
        prototypes: [D, N], mean activation over the domain's tokens at its own features, else zero.
        selectivity: [D, N], mean activation less the other domains' mean.
        variation: [N], coefficient of variation of the frequency over domains; inf where unused.
    """

    general: Tensor
    domain: Tensor
    prototypes: Tensor
    selectivity: Tensor
    variation: Tensor


def classify(
    statistics: FeatureStatistics,
    *,
    general_quantile: float = 0.7,
    largest_variation: float = 0.8,
    domain_quantile: float = 0.8,
    least: int = 64,
    frequency: Tensor | None = None,
    drift: Tensor | None = None,
    drift_quantile: float = 0.7,
) -> Taxonomy:
    """Sort the features by use; the published thresholds are the defaults.

    - general: frequency over all domains (or ``frequency`` [N], that on other text) at or above its
      ``general_quantile``, and coefficient of variation over domains at most ``largest_variation``;
      and where ``drift`` [N] (from the base
      to an instruction-tuned model) is given, that at or below its ``drift_quantile``;
    - domain d: mean activation less the mean over the other domains at or above its
      ``domain_quantile`` and positive, and not general.

    Where a rule leaves fewer than ``least`` (of few latents: an eighth of N), the nearest to
    passing it are taken in: the frequent by lowest variation (those of little drift first), or the
    most selective. A feature that is never active is in neither.

    Raises:
        ValueError: fewer than two domains: nothing to compare.
    """
    by_domain, mean = statistics.frequency(), statistics.mean()
    domains, latents = mean.shape
    if domains < 2:
        raise ValueError(f"a taxonomy compares domains: give at least 2, not {domains}")
    least = min(least, latents // 8)
    overall = by_domain.mean(0)
    variation = by_domain.std(0, unbiased=False) / overall
    variation = torch.where(overall > 0, variation, torch.inf)
    frequency = overall if frequency is None else frequency
    frequent = (frequency >= frequency.quantile(general_quantile)) & (frequency > 0)
    stable = torch.ones_like(frequent) if drift is None else drift <= drift.quantile(drift_quantile)
    general = frequent & (variation <= largest_variation) & stable
    if general.sum() < least:
        # Of D numbers the variation is at most sqrt(D - 1): adding D puts the unstable ones last.
        ranked = torch.where(frequent, variation + domains * ~stable, torch.inf)
        general = general | _smallest(ranked, least)
    others = (mean.sum(0, keepdim=True) - mean) / (domains - 1)
    selectivity = mean - others
    threshold = selectivity.quantile(domain_quantile, dim=1, keepdim=True)
    own = (selectivity >= threshold) & (selectivity > 0) & ~general
    for domain in range(domains):
        if own[domain].sum() < least:
            candidates = ~general & (selectivity[domain] > 0)
            own[domain] |= _smallest(
                torch.where(candidates, -selectivity[domain], torch.inf), least
            )
    return Taxonomy(general, own, mean * own, selectivity, variation)


def _smallest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` smallest finite values are, [N] -> [N] bool."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.argsort()[:count]] = True
    return chosen & values.isfinite()


def absolute_change(before: SparseFeatures, after: SparseFeatures, latents: int) -> Tensor:
    """sum_t |z'_t - z_t| of the same tokens' features, [T, K] and [T, K'] -> [N], float64."""
    total = torch.zeros(latents, dtype=torch.float64)
    for start in range(0, len(before.values), TOKENS):
        one, other = (
            SparseFeatures(*(part[start : start + TOKENS] for part in given)).dense(latents)
            for given in (before, after)
        )
        total += (other - one).abs().sum(0).double().cpu()
    return total


def _dense(taxonomy: Taxonomy, mean: Tensor, seed: int) -> Taxonomy:
    everything = torch.ones_like(taxonomy.domain)
    return taxonomy._replace(general=everything[0], domain=everything, prototypes=mean)


def _random(taxonomy: Taxonomy, mean: Tensor, seed: int) -> Taxonomy:
    """One permutation of all latents keeps every number of features, and that of shared ones."""
    order = torch.randperm(mean.shape[1], generator=torch.Generator().manual_seed(seed))
    own = taxonomy.domain[:, order]
    return taxonomy._replace(general=taxonomy.general[order], domain=own, prototypes=mean * own)


def _shuffled_prototypes(taxonomy: Taxonomy, mean: Tensor, seed: int) -> Taxonomy:
    """A cycle through the domains, in a random order: none keeps its own."""
    order = torch.randperm(len(mean), generator=torch.Generator().manual_seed(seed))
    prototypes = torch.empty_like(taxonomy.prototypes)
    prototypes[order] = taxonomy.prototypes[order.roll(1)]
    return taxonomy._replace(prototypes=prototypes)


CONTROLS: dict[str, Callable[[Taxonomy, Tensor, int], Taxonomy]] = {
    "none": lambda taxonomy, mean, seed: taxonomy,
    "dense": _dense,
    "random": _random,
    "shuffled_prototypes": _shuffled_prototypes,
}
"""What may stand in a taxonomy's place, from it, the mean activations [D, N] and a seed."""
