"""The adapter: specialists in the layers above a control site, routed by what the site sees.

B batch, S sequence, D model width, N latents, K active latents, E specialists, R rank components,
M adapted modules of a site.

One forward is enough. The stream entering layer c is the base model's own, because nothing below c
is adapted; its features are therefore exactly the base model's features, with no second pass and
no backward below c.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from steerlora.lm.decoder import (
    EditedLayer,
    decoder_of,
    final_norm,
    layers_of,
    layers_path,
    residual_streams,
)
from steerlora.methods.routed_lora.interventions import INTERVENTIONS, Intervention, SiteFacts
from steerlora.methods.routed_lora.lowrank import AdaptedLinear, LowRank
from steerlora.methods.routed_lora.prototypes import PrototypeRouter
from steerlora.methods.routed_lora.routers import LinearRouter, MLPRouter
from steerlora.methods.routed_lora.routing import Routing
from steerlora.methods.routed_lora.shape import (
    AdapterShape,
    check_saes,
    find_targets,
    refuse_adapted,
    size_of,
    total_rank,
)
from steerlora.methods.routed_lora.site import CurrentForward, ModuleScale, Site
from steerlora.saes.base import SparseAutoencoder

__all__ = ["Adapter", "AdapterShape", "Site", "total_rank"]


class Adapter(nn.Module):
    """Low-rank specialists of a base model, and the routers that weigh them.

    Parameter names, which are also the names in ``adapter_model.safetensors``:

    - ``layers.<i>:<path>.A`` [E*R, D_in] and ``.B`` [D_out, E*R]: the specialists of the module at
      ``<path>`` inside decoder layer i, dots as "/"; specialist e has rows (of B: columns)
      e*R ... (e+1)*R;
    - ``routers.<site>.<name>``: the router of the site's layers. Linear: ``weight``, ``bias``; MLP:
      ``hidden_weight``, ``hidden_bias``, ``gate_weight``, ``gate_bias``, ``rank_weight``,
      ``rank_bias`` (shapes in ``routers.py``); prototype: ``prototypes``, ``met``. With
      ``per_module`` the dimension M runs over :meth:`modules_of` the site, in that order;
    - ``scales.<site>``: mean feature norm, by which features are divided before routing;
    - ``active`` [E] bool: specialists that learnt routers may use.

    Args:
        model: the base model; it is frozen here, and attached to by :meth:`attach`.
        shape: what to build.
        saes: {site: SAE} for routing "sae", else unused. Frozen; they keep their own type.
        feature_scales: {site: mean L2 norm of the features}; 1 where absent.
        seed: of the initial weights.

    Raises:
        ValueError: a site beyond the last layer, a missing SAE or one of another width, a name
            that no module has, a model that carries an adapter already or that keeps no keys and
            values.

    Attributes:
        layers_path: the dotted name of the decoder layers in the base model, "model.layers".
    """

    def __init__(
        self,
        model: nn.Module,
        shape: AdapterShape,
        saes: Mapping[int, SparseAutoencoder] | None = None,
        *,
        feature_scales: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        saes = dict(saes or {}) if shape.routing == "sae" else {}
        refuse_adapted(model)
        _parameters_of_forward(decoder_of(model))
        generator = torch.Generator().manual_seed(seed)
        targets = find_targets(model, shape)
        width = decoder_of(model).config.hidden_size
        check_saes(shape, saes, width)
        self.shape, self.layers_path = shape, layers_path(model)
        self.layers = nn.ModuleDict(
            {
                name: LowRank(*size_of(target.linear), total_rank(shape), generator)
                for name, target in targets.items()
            }
        )
        at_first = shape.specialists if shape.active is None else shape.active
        self.register_buffer("active", torch.arange(shape.specialists) < at_first)
        self.routers, self.scales = nn.ModuleDict(), _Scales()
        self.forward_state = CurrentForward()
        self.sites: dict[int, Site] = {}
        # Held outside the module tree: the SAEs are inputs of the adapter, not part of it.
        self.saes = _Frozen(saes)
        for site in shape.sites if shape.routing != "none" else ():
            sae = saes.get(site)
            signal_width = width if sae is None else sae.latents
            self.routers[str(site)] = self._new_router(site, signal_width, generator)
            scale = float((feature_scales or {}).get(site, 1.0))
            self.scales.register_buffer(str(site), torch.tensor(scale))
            facts = SiteFacts(sae, float(shape.rank), {}) if sae is not None else None
            self.sites[site] = Site(self, site, facts)
        self._base_cache: DynamicCache | None = None
        # Carrier and its own forward; in a list, so that the model is no part of this module.
        self._carriers: list[tuple[nn.Module, object]] = []
        model.requires_grad_(False)

    def _new_router(self, site: int, width: int, generator: torch.Generator) -> nn.Module:
        if self.shape.router == "prototype":
            return PrototypeRouter(width, self.shape)
        kind = {"linear": LinearRouter, "mlp": MLPRouter}[self.shape.router]
        modules = len(self.modules_of(site)) if self.shape.per_module else 1
        return kind(width, self.shape, modules, generator)

    # Attaching and detaching

    def attach(self, model: nn.Module) -> Adapter:
        """Put the adapter into ``model``, in place; :meth:`remove` undoes it exactly.

        Its own home is where the model begins. Of a model that is spread over several devices each
        pair of matrices goes to its layer, and signals and scales to where they are read.
        """
        decoder = decoder_of(model)
        refuse_adapted(model)
        self.to(next(model.parameters()).device)
        scale = self.shape.alpha / self.shape.rank
        for name, (parent, child, linear) in find_targets(model, self.shape).items():
            low_rank, source = self.layers[name], self._source(name)
            setattr(parent, child, AdaptedLinear(linear, low_rank, source, scale))
            low_rank.to(linear.weight.device)
        layers, forward = layers_of(model), decoder.forward
        for layer, site in self.sites.items():
            layers[layer] = EditedLayer(layers[layer], site.edit)
        names = _parameters_of_forward(decoder)

        def observed(*args, **kwargs):
            now, given = self.forward_state, {**dict(zip(names, args, strict=False)), **kwargs}
            if not now.disabled:
                now.attention_mask = given.get("attention_mask")
                now.position_ids = given.get("position_ids")
                cache = given.get("past_key_values")
                now.continuing = cache is not None and cache.get_seq_length() > 0
                now.base_streams = self._base_streams(model, given, cached=cache is not None)
            return forward(**given)

        self._carriers.append((model, vars(decoder).get("forward")))
        decoder.forward = observed
        return self

    def remove(self) -> None:
        """Give the model back as it was: the same modules, no wrapper left."""
        if not self._carriers:
            raise ValueError("the adapter is not attached to a model")
        model, own_forward = self._carriers.pop()
        decoder = decoder_of(model)
        del decoder.forward
        if own_forward is not None:
            decoder.forward = own_forward
        layers = layers_of(model)
        for layer in self.sites:
            layers[layer] = layers[layer].layer
        for parent, child, adapted in find_targets(model, self.shape).values():
            setattr(parent, child, adapted.base)

    def modules_of(self, site: int) -> list[str]:
        """Names in ``layers`` of the modules that a site controls, lowest layer first."""
        return [name for name in self.layers if self._site_of(name) == site]

    def _site_of(self, name: str) -> int | None:
        below = [site for site in self.shape.sites if site <= int(name.split(":")[0])]
        return max(below, default=None)

    def _source(self, name: str) -> ModuleScale:
        site = self.sites.get(self._site_of(name))
        index = self.modules_of(site.layer).index(name) if site and self.shape.per_module else 0
        return ModuleScale(self.forward_state, site, index)

    # A second forward, of the base: only where the shape asks for one

    @torch.no_grad()
    def _base_streams(self, model: nn.Module, given: dict, *, cached: bool) -> dict[int, Tensor]:
        """{site: stream of the frozen base}; empty where sites read the current streams.

        ``given`` is what the decoder is called with, ``cached`` whether that has a KV cache.

        With one site and source "base" there is nothing to do: below it nothing is adapted.
        """
        source, sites = self.shape.source, list(self.sites)
        if source == "inline" or (source == "base" and len(sites) < 2) or not sites:
            return {}
        if cached and not self.forward_state.continuing:
            self._base_cache = DynamicCache()
        kept = ("position_ids", "inputs_embeds", "cache_position")
        last = len(layers_of(model))
        with self.disabled():
            streams = residual_streams(
                model,
                given.get("input_ids"),
                given.get("attention_mask"),
                [last] if source == "base_last" else sites,
                past_key_values=self._base_cache if cached else None,
                use_cache=cached,
                **{name: given[name] for name in kept if name in given},
            )
        if source == "base_last":
            return dict.fromkeys(sites, final_norm(model)(streams[last]))
        return streams

    # What a user asks of it

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The attached model computes exactly what the base model would, inside this context."""
        before, self.forward_state.disabled = self.forward_state.disabled, True
        try:
            yield
        finally:
            self.forward_state.disabled = before

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, a control that is running has no part in the forwards."""
        running, self.forward_state.intervention = self.forward_state.intervention, None
        try:
            yield
        finally:
            self.forward_state.intervention = running

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
        """Run the model with its control signal changed, inside this context only.

        Args:
            name: one of ``INTERVENTIONS``.
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
        if name not in INTERVENTIONS:
            raise ValueError(f"no intervention {name!r}: choose from {', '.join(INTERVENTIONS)}")
        if self.shape.routing != "sae":
            raise ValueError(
                "interventions act on SAE routing; this adapter's routing is "
                f"{self.shape.routing!r}"
            )
        unknown = [site for site in sites if site not in self.sites]
        if unknown:
            raise ValueError(f"no control site {unknown[0]}: there are {list(self.sites)}")
        running = self.forward_state.intervention
        if running is not None:
            raise ValueError(
                f"intervention {name!r} inside another ({type(running).__name__}): "
                "run one at a time"
            )
        intervention = INTERVENTIONS[name](
            seed=seed, domain=domain, strength=strength, sites=tuple(sites), domains=tuple(domains)
        )
        self.forward_state.intervention = intervention
        try:
            yield intervention
            if not intervention.ran:
                raise RuntimeError(f"intervention {name!r}: its control site never ran inside it")
        finally:
            self.forward_state.intervention = None

    def routing(self) -> dict[int, Routing]:
        """The last forward's gates [B, S, E] and rank masks [B, S, R] by site, detached.

        With a router a module: their means over the site's modules; ``sites[<site>].routing`` has
        each, [B, S, M, E] and [B, S, M, R].
        """
        found = {}
        for layer, site in self.sites.items():
            if site.routing is not None:
                parts = (part.detach() for part in site.routing)
                parts = (part.mean(-2) if self.shape.per_module else part for part in parts)
                found[layer] = Routing(*parts)
        return found

    def available(self) -> Tensor:
        """[E] bool: specialists that routing may choose as things stand.

        For learnt routers the active ones; for prototypes those whose domain was met.
        """
        if self.shape.router == "prototype" and self.sites:
            return self.routers[str(min(self.sites))].met[:-1]
        return self.active

    def real_tokens(self, stream: Tensor) -> Tensor:
        """True on real tokens of the last forward, [B, S]; with a KV cache, the mask's end."""
        return self.forward_state.real_tokens(stream)

    def truncate(self, hard_rank: float) -> None:
        """From now on, leave out mask values below ``hard_rank`` where no gradient is recorded."""
        self.shape = replace(self.shape, hard_rank=hard_rank)

    def parameter_count(self) -> int:
        """Trainable parameters, routers included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def _apply(self, function, *args, **kwargs):
        super()._apply(function, *args, **kwargs)
        # The SAEs follow to another device; in another type their features would not be the same.
        device = next(self.parameters()).device
        for sae in self.saes.values():
            sae.to(device)
        return self


def _parameters_of_forward(decoder: nn.Module) -> list[str]:
    """The names that a decoder's forward knows its positional arguments by."""
    names = list(inspect.signature(decoder.forward).parameters)
    if "past_key_values" not in names:
        raise ValueError(
            f"{type(decoder).__name__} keeps no keys and values (its forward takes "
            f"{', '.join(names)}): an adapter needs an attention decoder"
        )
    return names


class _Scales(nn.Module):
    """{site: a number}: buffers, since sharding engines take no parameter without a dimension."""

    def __getitem__(self, site: str) -> Tensor:
        return self._buffers[site]


class _Frozen(dict):
    """{site: SAE}, frozen and in evaluation mode; a plain dict, so never in the state dict."""

    def __init__(self, saes: Mapping[int, SparseAutoencoder]) -> None:
        super().__init__({site: sae.eval().requires_grad_(False) for site, sae in saes.items()})
