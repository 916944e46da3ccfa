"""The adapter: specialists in the layers above a control site, routed by what the site sees.

B batch, S sequence, D model width, N latents, K active latents, E specialists, R rank components,
M adapted modules of a site.

One forward is enough. The stream entering layer c is the base model's own, because nothing below c
is adapted; its features are therefore exactly the base model's features, with no second pass and
no backward below c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from steerlora.data.batches import ChatBatch
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import decoder_of, layers_path
from steerlora.lm.targets import size_of
from steerlora.methods.base import LowRankUpdate, Method, Sources
from steerlora.methods.interventions import INTERVENTIONS
from steerlora.methods.lowrank import AdaptedLinear, LowRank
from steerlora.methods.routed_lora.base_forward import keep_base, read_base
from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.methods.routed_lora.health import SiteHealth
from steerlora.methods.routed_lora.interventions import Intervention, SiteFacts
from steerlora.methods.routed_lora.peft import export_peft
from steerlora.methods.routed_lora.routing import ROUTERS, Routing
from steerlora.methods.routed_lora.site import CurrentForward, ModuleScale, Site
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.taxonomy import Taxonomy


class Adapter(Method):
    """Low-rank specialists of a base model, and the routers that weigh them.

    Parameter names, which are also the names in ``adapter_model.safetensors``:

    - ``layers.<i>:<path>.A`` [E*R, D_in] and ``.B`` [D_out, E*R]: the specialists of the module at
      ``<path>`` inside decoder layer i, dots as "/"; specialist e has rows (of B: columns)
      e*R ... (e+1)*R;
    - ``routers.<site>.<name>``: the router of the site's layers. Linear: ``weight``, ``bias``; MLP:
      ``hidden_weight``, ``hidden_bias``, ``gate_weight``, ``gate_bias``, ``rank_weight``,
      ``rank_bias`` (shapes in ``routers.py``); prototype: ``prototypes``, ``known``. With
      ``per_module`` the dimension M runs over :meth:`modules_of` the site, in that order;
    - ``scales.<site>``: mean feature norm, by which features are divided before routing;
    - ``active`` [E] bool: specialists that learnt routers may use; with ``memory.per_module``
      [modules, E], in the order of ``layers``.

    Args:
        model: the base model; it is frozen here, and attached to by :meth:`attach`.
        config: what to build.
        saes: {site: SAE} for signal "sae", else unused. Frozen; they keep their own type.
        feature_scales: {site: mean L2 norm of the features}; 1 where absent.
        seed: of the initial weights.

    Raises:
        ValueError: a site beyond the last layer, a missing SAE or one of another width, a name
            that no module has, a model that carries an adapter already or that keeps no keys and
            values.

    Attributes:
        layers_path: the dotted name of the decoder layers in the base model, "model.layers".
        taxonomies: {site: its features sorted by use}, where the configuration asks for them.
        assigned: [B], the specialist of every row of the batch in training, in place of the
            router's choice wherever a gradient is recorded; None: the router's.
    """

    forward_type = CurrentForward

    def __init__(
        self,
        model: nn.Module,
        config: RoutedLoRAConfig,
        saes: Mapping[int, SparseAutoencoder] | None = None,
        *,
        feature_scales: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(config, model, saes)
        generator = torch.Generator().manual_seed(seed)
        targets = self.targets(model)
        width = decoder_of(model).config.hidden_size
        self.layers_path = layers_path(model)
        self.layers = nn.ModuleDict(
            {
                name: LowRank(*size_of(target.linear), config.total_rank, generator)
                for name, target in targets.items()
            }
        )
        at_first = config.specialists if config.active is None else config.active
        active = torch.arange(config.specialists) < at_first
        if config.memory.per_module:
            active = active.repeat(len(self.layers), 1)
        self.register_buffer("active", active)
        self.routers, self.scales = nn.ModuleDict(), _Scales()
        self.sites: dict[int, Site] = {}
        for site in config.sites if config.routed else ():
            sae = self.saes.get(site)
            signal_width = width if sae is None else sae.latents
            modules = len(self.modules_of(site)) if config.per_module else 1
            router = ROUTERS[config.router](signal_width, config, modules, generator)
            self.routers[str(site)] = router
            scale = float((feature_scales or {}).get(site, 1.0))
            self.scales.register_buffer(str(site), torch.tensor(scale))
            facts = SiteFacts(sae, float(config.rank), {}) if sae is not None else None
            self.sites[site] = Site(self, site, facts)
        self.taxonomies: dict[int, Taxonomy] = {}
        self.assigned: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, config: RoutedLoRAConfig, sources: Sources, seed: int) -> Adapter:
        """A new adapter with the SAEs and prototypes of ``sources``, attached."""
        adapter = cls(
            model,
            config,
            {site: given.sae for site, given in sources.saes.items()},
            feature_scales={site: given.mean_norm for site, given in sources.saes.items()},
            seed=seed,
        )
        adapter.taxonomies = dict(sources.taxonomies)
        if config.signal_tokens == "text":
            adapter.signal_tokens = sources.signal_tokens
        for site in config.sites if config.prototypes else ():
            if site in sources.taxonomies:
                adapter.routers[str(site)].set_prototypes(sources.taxonomies[site].prototypes)
        return adapter.attach(model)

    # What it changes of a model

    def edits(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {layer: site.edit for layer, site in self.sites.items()}

    def replacements(self, model: nn.Module) -> dict[str, AdaptedLinear]:
        """Of a model that is spread over several devices each pair of matrices goes to its layer,
        and signals and scales to where they are read."""
        scale, found = self.config.alpha / self.config.rank, {}
        for name, target in self.targets(model).items():
            low_rank = self.layers[name].to(target.linear.weight.device)
            found[name] = AdaptedLinear(
                target.linear, low_rank, self._source(name), scale, self.config.dropout
            )
        return found

    def observe(self, model: nn.Module, given: dict[str, Any]) -> None:
        super().observe(model, given)
        if self.assignment() is None:
            read_base(self, model, given)

    def keep(self, cache: Cache | None) -> None:
        for site in self.sites.values():
            site.keep(cache)
        keep_base(self.forward_state, cache)

    def assignment(self) -> Tensor | None:
        """``assigned``, in a forward of training."""
        return self.assigned if torch.is_grad_enabled() else None

    def adapted(self) -> dict[str, AdaptedLinear]:
        """{name in ``layers``: the layer that stands in the model}, of the attached adapter."""
        return {name: target.linear for name, target in self._attached[-1].replaced.items()}

    def modules_of(self, site: int) -> list[str]:
        """Names in ``layers`` of the modules that a site controls, lowest layer first."""
        return [name for name in self.layers if self._site_of(name) == site]

    def _site_of(self, name: str) -> int | None:
        below = [site for site in self.config.sites if site <= int(name.split(":")[0])]
        return max(below, default=None)

    def _source(self, name: str) -> ModuleScale:
        site = self._site_of(name) if self.sites else None
        routed = site is not None and self.config.per_module
        index = self.modules_of(site).index(name) if routed else 0
        return ModuleScale(self.running, site, index)

    # What a user asks of it

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, a control that is running has no part in the forwards."""
        running, self.running.intervention = self.running.intervention, None
        try:
            yield
        finally:
            self.running.intervention = running

    @contextmanager
    def intervention(
        self,
        name: str,
        *,
        seed: int = 0,
        domain: str | None = None,
        strength: float = 1.0,
        sites: Sequence[int] = (),
        domains: Sequence[str] = (),
    ) -> Iterator[Intervention]:
        """Run the model with its control signal changed, in this context and this thread only.

        Args:
            name: a registered one.
            seed: of the intervention's draws.
            domain: the tokens' true domain, for ``oracle_domain`` and ``domains``.
            strength: from 0 (intact) to 1: how much of the intervened signal is mixed in.
            sites: that it changes; none given: all.
            domains: whose tokens it changes; none given: all.

        Raises:
            ValueError: an unknown name or site, a strength out of range, an adapter that is not
                routed by an SAE, or an intervention inside another.
            RuntimeError: the context ended and no control site had run inside it.
        """
        if not self.config.has_control_signal:
            return super().intervention(name)
        INTERVENTIONS.check("intervention", name)
        unknown = [site for site in sites if site not in self.sites]
        if unknown:
            raise ValueError(f"no control site {unknown[0]}: there are {list(self.sites)}")
        running = self.running.intervention
        if running is not None:
            raise ValueError(
                f"intervention {name!r} inside another ({type(running).__name__}): "
                "run one at a time"
            )
        intervention = INTERVENTIONS[name](
            seed=seed, domain=domain, strength=strength, sites=tuple(sites), domains=tuple(domains)
        )
        self.running.intervention = intervention
        try:
            yield intervention
            if not intervention.ran:
                raise RuntimeError(f"intervention {name!r}: its control site never ran inside it")
        finally:
            self.running.intervention = None

    def routing(self) -> dict[int, Routing]:
        """The gates [B, S, E] and rank masks [B, S, R] of this thread's last forward, by site,
        detached.

        With a router a module: their means over the site's modules; ``sites[<site>].routing`` has
        each, [B, S, M, E] and [B, S, M, R].
        """
        found = {}
        for layer, site in self.sites.items():
            if site.routing is not None:
                parts = (part.detach() for part in site.routing)
                parts = (part.mean(-2) if self.config.per_module else part for part in parts)
                found[layer] = Routing(*parts)
        return found

    def available(self) -> Tensor:
        """[E] bool: specialists that routing may choose as things stand.

        For learnt routers the active ones (of any module); for prototypes those whose domain has
        come.
        """
        first = self.routers[str(min(self.sites))] if self.sites else None
        found = None if first is None else first.available()
        if found is None:
            found = self.active if self.active.dim() == 1 else self.active.any(0)
        return found

    def active_at(self, site: int) -> Tensor:
        """Active specialists of a site's modules: [E] bool, or [M, E] where each has its own."""
        if self.active.dim() == 1:
            return self.active
        names = list(self.layers)
        return self.active[[names.index(name) for name in self.modules_of(site)]]

    def tokens_with_signal(self, stream: Tensor) -> Tensor:
        """True on tokens of the last forward that carry a signal, [B, S]; with a KV cache, of the
        new ones."""
        return self.forward_state.signal_tokens(stream, self.signal_tokens)

    def with_signal(self, batch: ChatBatch) -> Tensor:
        """True on tokens of a batch that carry a signal, [B, S]."""
        return self.signal_tokens(batch.input_ids, batch.attention_mask, batch.position_ids)

    def configure(self, *, hard_rank: float = 0.0) -> None:
        """From now on, leave out mask values below ``hard_rank`` where no gradient is recorded."""
        self.config = replace(self.config, hard_rank=hard_rank)

    def products(self) -> list[nn.Parameter]:
        """The matrices of the adapted layers; routers read a few rows of their tables a token."""
        return list(self.layers.parameters())

    def low_rank(self) -> dict[str, LowRankUpdate]:
        scale, specialists = self.config.alpha / self.config.rank, self.config.specialists
        return {
            name: LowRankUpdate(layer.A, layer.B, scale, specialists)
            for name, layer in self.layers.items()
        }

    def gates(self) -> dict[int, Tensor]:
        return {site: routing.gate for site, routing in self.routing().items()}

    def health(self, domains: Sequence[str], seed: int) -> SiteHealth | None:
        """What measures the routing of the forwards that follow, site by site."""
        return SiteHealth(self, domains, seed) if self.sites else None

    def nearness(self, rows: Sequence[EncodedChat], pad_token_id: int) -> dict[int, Tensor]:
        from steerlora.methods.routed_lora.signals import prompt_signals

        signals = prompt_signals(self.model, self, rows, pad_token_id)
        return {site: self.routers[str(site)].nearness(own) for site, own in signals.items()}

    def facts(self) -> dict:
        """What interventions know of each site, beside the weights."""
        return {
            str(layer): {
                "mean_rank": site.facts.mean_rank,
                "specialist_of_domain": site.facts.specialist_of_domain,
            }
            for layer, site in self.sites.items()
            if site.facts is not None
        }

    def load_facts(self, stored: dict) -> None:
        """Take back what :meth:`facts` gave."""
        for layer, facts in stored.items():
            site = self.sites[int(layer)]
            site.facts.mean_rank = facts["mean_rank"]
            site.facts.specialist_of_domain = facts["specialist_of_domain"]

    @torch.no_grad()
    def forget(self, specialist: int) -> None:
        for router in self.routers.values():
            router.forget(specialist)
        rows = self.config.rows_of(specialist)
        for layer in self.layers.values():
            layer.A[rows] = 0
            layer.B[:, rows] = 0

    def export_peft(
        self, directory: Path, *, base_path: str, specialist: int | None = None
    ) -> None:
        export_peft(self, directory, base_path=base_path, specialist=specialist)


class _Scales(nn.Module):
    """{site: a number}: buffers, since sharding engines take no parameter without a dimension."""

    def __getitem__(self, site: str) -> Tensor:
        return self._buffers[site]
