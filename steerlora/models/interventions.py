"""Changes of the control signal made on purpose: the causal controls of a routed adapter.

B batch, S sequence, T real tokens, D model width, N latents, K active latents, E specialists,
R rank components. Every draw is seeded and touches real tokens only; padding never enters a draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerlora.models.router import Routing
from steerlora.models.sae import SparseAutoencoder, SparseFeatures, untrained_like


@dataclass
class SiteFacts:
    """What an intervention may know of the control site it acts on."""

    sae: SparseAutoencoder
    mean_rank: float
    """Effective rank sum_j m_j that training ended with, over real tokens."""
    specialist_of_domain: dict[str, int]
    """The specialist that carried each domain most when training ended."""


@dataclass
class Intervention:
    """One control, for the length of a context. Sub-classes override one of the two methods.

    Args:
        seed: of every draw.
        domain: the true domain of the tokens, for ``oracle_domain``.
    """

    seed: int = 0
    domain: str | None = None
    ran: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._generator: torch.Generator | None = None
        self._cache: dict[int, object] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The context's own random stream, so that nothing else moves it."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def features(
        self, features: SparseFeatures, stream: Tensor, real: Tensor, site: SiteFacts
    ) -> SparseFeatures:
        """The signal in place of ``features`` [B, S, K]; ``real`` [B, S] is True on tokens."""
        return features

    def routing(self, routing: Routing, site: SiteFacts) -> Routing:
        """The routing put in place of ``routing``."""
        return routing


class ReplaceDense(Intervention):
    """Top-k (by magnitude) of a fixed random projection of the hidden state: no SAE at all.

    Each token keeps the norm of its intact signal, so that only the directions differ.
    """

    def features(self, features, stream, real, site):
        projection = self._cache.get(id(site))
        if projection is None:
            shape = site.sae.W_enc.shape
            projection = torch.empty(shape, device=stream.device).normal_(
                generator=self.generator(stream.device)
            )
            self._cache[id(site)] = projection
        dense = stream.float() @ projection
        indices = dense.abs().topk(features.values.shape[-1], dim=-1).indices
        values = dense.gather(-1, indices)
        norm = features.values.norm(dim=-1, keepdim=True)
        values = values * norm / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return SparseFeatures(values, indices)


class ReplaceRandomSAE(Intervention):
    """Features of an untrained SAE of the same shape."""

    def features(self, features, stream, real, site):
        if id(site) not in self._cache:
            self._cache[id(site)] = untrained_like(site.sae, self.seed).to(stream.device)
        return self._cache[id(site)].encode(stream)


class Randomize(Intervention):
    """The same values on random latents, drawn anew for every token."""

    def features(self, features, stream, real, site):
        active = features.values.shape[-1]
        tokens = int(real.sum())
        latents = site.sae.W_enc.shape[1]
        draw = torch.rand(
            tokens, latents, generator=self.generator(real.device), device=real.device
        )
        indices = features.indices.clone()
        indices[real] = draw.topk(active, dim=-1).indices
        return SparseFeatures(features.values, indices)


class Shuffle(Intervention):
    """Another token's signal, permuted over the real tokens of the batch."""

    def features(self, features, stream, real, site):
        order = torch.randperm(
            int(real.sum()), generator=self.generator(real.device), device=real.device
        )
        values, indices = features.values.clone(), features.indices.clone()
        values[real] = features.values[real][order]
        indices[real] = features.indices[real][order]
        return SparseFeatures(values, indices)


class PermuteLatents(Intervention):
    """A fixed permutation of latent identities, after training.

    (Fixed before training it would be a relabelling, and no control at all.)
    """

    def features(self, features, stream, real, site):
        if id(site) not in self._cache:
            latents = site.sae.W_enc.shape[1]
            device = features.indices.device
            self._cache[id(site)] = torch.randperm(
                latents, generator=self.generator(device), device=device
            )
        return SparseFeatures(features.values, self._cache[id(site)][features.indices])


class Invert(Intervention):
    """The sign of every active latent flipped."""

    def features(self, features, stream, real, site):
        return SparseFeatures(-features.values, features.indices)


class FixedRank(Intervention):
    """Signal and gate untouched; the mask is one up to the mean trained rank and zero beyond."""

    def routing(self, routing, site):
        kept = max(1, round(site.mean_rank))
        components = torch.arange(routing.mask.shape[-1], device=routing.mask.device)
        fixed = (components < kept).to(routing.mask.dtype)
        return Routing(routing.gate, fixed.expand_as(routing.mask))


class UniformGate(Intervention):
    """Signal and mask untouched; every specialist weighs 1 / E."""

    def routing(self, routing, site):
        uniform = torch.full_like(routing.gate, 1 / routing.gate.shape[-1])
        return Routing(uniform, routing.mask)


class OracleDomain(Intervention):
    """Signal and mask untouched; the gate is one-hot at the true domain's own specialist."""

    def routing(self, routing, site):
        if self.domain not in site.specialist_of_domain:
            raise ValueError(
                f"oracle_domain needs the true domain, one of {sorted(site.specialist_of_domain)}; "
                f"got {self.domain!r}"
            )
        gate = torch.zeros_like(routing.gate)
        gate[..., site.specialist_of_domain[self.domain]] = 1
        return Routing(gate, routing.mask)


INTERVENTIONS: dict[str, type[Intervention]] = {
    "replace_dense": ReplaceDense,
    "replace_random_sae": ReplaceRandomSAE,
    "randomize": Randomize,
    "shuffle": Shuffle,
    "permute_latents": PermuteLatents,
    "invert": Invert,
    "fixed_rank": FixedRank,
    "uniform_gate": UniformGate,
    "oracle_domain": OracleDomain,
}
"""Every control by its name in configs and tables."""
