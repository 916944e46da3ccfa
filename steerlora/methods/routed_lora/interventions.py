"""Changes of the control signal made on purpose: the causal controls of a routed adapter.

B batch, S sequence, D model width, N latents, K active latents, E specialists,
R rank components. Every draw is seeded. A change of the features touches the tokens that carry a
signal and no draw reads another: those have none, before and after. A change of the routing touches
every token, since every one is routed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.methods.interventions import intervention
from steerlora.methods.routed_lora.routing import Routing
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.sparse import SparseFeatures


@dataclass
class SiteFacts:
    """What an intervention may know of the control site it acts on."""

    sae: SparseAutoencoder
    mean_rank: float
    """Effective rank sum_j m_j that training ended with, over tokens with a signal."""
    specialist_of_domain: dict[str, int]
    """The specialist that each domain used most when training ended."""
    active: Tensor | None = None
    """[E], or [M, E] where every module has its own, True on the specialists in use; None: all."""


@dataclass
class Intervention:
    """One control, for the length of a context. Sub-classes override one of the two methods.

    The adapter calls :meth:`apply_features` and :meth:`apply_routing`, which do the targeting and
    the mixing once for every control.

    Args:
        seed: of every draw.
        domain: the true domain of all tokens, where :meth:`begin` does not say it row by row.
        strength: s in [0, 1]; the signal becomes (1 - s) z + s z', with z' the control's own.
        sites: control layers that are touched; empty: all.
        domains: true domains whose tokens are touched, others stay intact; empty: all.

    Raises:
        ValueError: a strength outside [0, 1].
    """

    needs_domain: ClassVar[bool] = False
    """It needs the tokens' true domain."""
    in_training: ClassVar[bool] = True
    """It means something while an adapter trains."""
    fixes: ClassVar[frozenset[str]] = frozenset()
    """Of `SiteFacts`: what it fixes, so that training under it must not record it anew."""

    seed: int = 0
    domain: str | None = None
    strength: float = 1.0
    sites: tuple[int, ...] = ()
    domains: tuple[str, ...] = ()
    ran: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength {self.strength}: choose 0 (intact) to 1 (the control in full)"
            )
        self._draws: torch.Generator | None = None
        self._draws_seed = self.seed
        self._fixed: torch.Generator | None = None
        self._rows: Sequence[str | None] | None = None
        self._cache: dict[int, object] = {}

    def begin(self, step: int, domains: Sequence[str | None] | None = None) -> None:
        """Before a training step: its draws become a function of the seed and the step alone.

        Args:
            step: the optimizer step, from 0.
            domains: true domain of every row of the batch, [B]; None: ``domain`` of all.
        """
        self._draws = None
        self._draws_seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        self._rows = domains

    def draws(self, device: torch.device) -> torch.Generator:
        """The random stream of what is drawn anew in every forward."""
        if self._draws is None:
            self._draws = torch.Generator(device).manual_seed(self._draws_seed)
        return self._draws

    def fixed(self, device: torch.device) -> torch.Generator:
        """The random stream of what is drawn once a site, whatever the step."""
        if self._fixed is None:
            self._fixed = torch.Generator(device).manual_seed(self.seed)
        return self._fixed

    def apply_features(
        self, features: SparseFeatures, stream: Tensor, counted: Tensor, site: SiteFacts, layer: int
    ) -> SparseFeatures:
        """The signal of the control site at ``layer`` as the router shall see it.

        At full strength on every row that is the control's own, [B, S, K]; intact rows alone leave
        it as it is. Otherwise it is a union, [B, S, 2 K]: intact entries, then the control's, each
        with its share; where both name a latent, the router adds them up.

        Args:
            features: the intact signal, [B, S, K].
            stream: the residual at the site, [B, S, D].
            counted: [B, S], True on tokens that carry a signal.
            site: what is known of it.
            layer: its number.
        """
        share = self._share(layer, len(counted))
        if share is None:
            return features
        changed = self.features(features, stream, counted, site)
        if share == [1.0] or changed is features:
            return changed
        weight = _by_row(share, features.values)
        return SparseFeatures(
            torch.cat([(1 - weight) * features.values, weight * changed.values], -1),
            torch.cat([features.indices, changed.indices], -1),
        )

    def apply_routing(self, routing: Routing, site: SiteFacts, layer: int) -> Routing:
        """The routing put in place of that of the site at ``layer``: gate and mask mixed alike."""
        share = self._share(layer, len(routing.gate))
        if share is None:
            return routing
        changed = self.routing(routing, site)
        if share == [1.0]:
            return changed
        return Routing(
            *(
                intact if new is intact else torch.lerp(intact, new, _by_row(share, intact))
                for intact, new in zip(routing, changed, strict=True)
            )
        )

    def features(
        self, features: SparseFeatures, stream: Tensor, counted: Tensor, site: SiteFacts
    ) -> SparseFeatures:
        """The control's signal in place of ``features``; ``counted`` [B, S] is True on tokens that
        carry a signal."""
        return features

    def routing(self, routing: Routing, site: SiteFacts) -> Routing:
        """The control's routing in place of ``routing``."""
        return routing

    def rows(self, batch: int) -> Sequence[str | None]:
        """The true domain of each of ``batch`` rows."""
        if self._rows is None:
            return [self.domain] * batch
        assert len(self._rows) == batch, f"{len(self._rows)} domains for {batch} rows"
        return self._rows

    def touches(self, domain: str | None) -> bool:
        """Whether tokens of this true domain are among the targeted."""
        return not self.domains or domain in self.domains

    def _share(self, layer: int, batch: int) -> list[float] | None:
        """The control's share of each row, or of all alike; None where nothing is touched."""
        if self.sites and layer not in self.sites:
            return None
        self.ran = True
        shares = [self.strength * self.touches(domain) for domain in self.rows(batch)]
        if not any(shares):
            return None
        return shares if len(set(shares)) > 1 else shares[:1]


def _by_row(share: list[float], like: Tensor) -> Tensor:
    """Shares as [B or 1, 1, ...] with the type and dimensions of ``like``."""
    return like.new_tensor(share).view(-1, *[1] * (like.dim() - 1))


@intervention("replace_dense")
class ReplaceDense(Intervention):
    """Top-k (by magnitude) of a fixed random projection of the hidden state: no SAE at all.

    Each token keeps the norm of its intact signal, and where an SAE has no fixed k the number of
    its active latents, so that only the directions differ.
    """

    def features(self, features, stream, counted, site):
        projection = self._cache.get(id(site))
        if projection is None:
            projection = torch.empty(site.sae.width, site.sae.latents, device=stream.device)
            projection.normal_(generator=self.fixed(stream.device))
            self._cache[id(site)] = projection
        dense = stream.float() @ projection
        indices = dense.abs().topk(features.values.shape[-1], dim=-1).indices
        values = dense.gather(-1, indices)
        if site.sae.k is None:
            active = (features.values > 0).sum(-1, keepdim=True)
            values = values * (torch.arange(values.shape[-1], device=values.device) < active)
        norm = features.values.norm(dim=-1, keepdim=True)
        values = values * norm / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return SparseFeatures(values, indices)


@intervention("replace_random_sae")
class ReplaceRandomSAE(Intervention):
    """Features of an untrained SAE of the same shape."""

    def features(self, features, stream, counted, site):
        if id(site) not in self._cache:
            self._cache[id(site)] = site.sae.untrained_like(self.seed).to(stream.device)
        return self._cache[id(site)].encode(stream)


@intervention("randomize")
class Randomize(Intervention):
    """The same values on random latents, drawn anew for every token."""

    def features(self, features, stream, counted, site):
        active = features.values.shape[-1]
        tokens = int(counted.sum())
        draw = torch.rand(
            tokens, site.sae.latents, generator=self.draws(counted.device), device=counted.device
        )
        indices = features.indices.clone()
        indices[counted] = draw.topk(active, dim=-1).indices
        return SparseFeatures(features.values, indices)


@intervention("shuffle")
class Shuffle(Intervention):
    """Another token's signal, permuted over the tokens of the batch that carry one."""

    def features(self, features, stream, counted, site):
        order = torch.randperm(
            int(counted.sum()), generator=self.draws(counted.device), device=counted.device
        )
        values, indices = features.values.clone(), features.indices.clone()
        values[counted] = features.values[counted][order]
        indices[counted] = features.indices[counted][order]
        return SparseFeatures(values, indices)


@intervention("permute_latents")
class PermuteLatents(Intervention):
    """A fixed permutation of latent identities, after training.

    (Fixed before training it would be a relabelling, and no control at all.)
    """

    in_training = False

    def features(self, features, stream, counted, site):
        if id(site) not in self._cache:
            device = features.indices.device
            self._cache[id(site)] = torch.randperm(
                site.sae.latents, generator=self.fixed(device), device=device
            )
        return SparseFeatures(features.values, self._cache[id(site)][features.indices])


@intervention("invert")
class Invert(Intervention):
    """The sign of every active latent flipped."""

    def features(self, features, stream, counted, site):
        return SparseFeatures(-features.values, features.indices)


@intervention("fixed_rank")
class FixedRank(Intervention):
    """Signal and gate untouched; the mask is one up to the mean trained rank and zero beyond."""

    fixes = frozenset({"mean_rank"})

    def routing(self, routing, site):
        kept = max(1, round(site.mean_rank))
        components = torch.arange(routing.mask.shape[-1], device=routing.mask.device)
        fixed = (components < kept).to(routing.mask.dtype)
        return Routing(routing.gate, fixed.expand_as(routing.mask))


@intervention("uniform_gate")
class UniformGate(Intervention):
    """Signal and mask untouched; every active specialist weighs one over their number."""

    def routing(self, routing, site):
        uniform = torch.ones_like(routing.gate)
        if site.active is not None:
            uniform = uniform * site.active
        return Routing(uniform / uniform.sum(-1, keepdim=True), routing.mask)


@intervention("oracle_domain")
class OracleDomain(Intervention):
    """Signal and mask untouched; the gate is one-hot at the true domain's own specialist."""

    needs_domain = True
    fixes = frozenset({"specialist_of_domain"})

    def routing(self, routing, site):
        owners, rows = site.specialist_of_domain, self.rows(len(routing.gate))
        for domain in rows:
            if domain not in owners and self.touches(domain):
                raise ValueError(
                    f"oracle_domain needs the true domain, one of {sorted(owners)}; got {domain!r}"
                )
        # Rows of other domains stay intact: what stands here for them is not read.
        chosen = torch.tensor([owners.get(d, 0) for d in rows], device=routing.gate.device)
        one_hot = F.one_hot(chosen, routing.gate.shape[-1]).to(routing.gate.dtype)
        shape = (len(rows), *[1] * (routing.gate.dim() - 2), -1)
        return Routing(one_hot.view(shape).expand_as(routing.gate), routing.mask)
