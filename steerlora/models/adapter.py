"""The adapter: specialists in the layers above a control site, routed by what the site sees.

B batch, S sequence, D model width, N latents, K active latents, E specialists, R rank components.

One forward is enough. The stream entering layer c is the base model's own, because nothing below c
is adapted; its features are therefore exactly the base model's features, with no second pass and
no backward below c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steerlora.models.context import ContextState, average_so_far
from steerlora.models.decoder import EditedLayer, decoder_of
from steerlora.models.interventions import INTERVENTIONS, Intervention, SiteFacts
from steerlora.models.lowrank import AdaptedLinear, LowRank
from steerlora.models.router import Router, Routing
from steerlora.models.sae import SparseAutoencoder
from steerlora.models.shape import (
    AdapterShape,
    check_saes,
    find_targets,
    refuse_adapted,
    total_rank,
)

__all__ = ["Adapter", "AdapterShape", "Site", "total_rank"]


class Site:
    """One control site at work: reads the stream, routes it, and holds the result for its layers.

    Attributes:
        scale: [B, S, E*R] of the current forward: (alpha / R) * gate outer mask.
        routing: the current forward's gate and mask, with gradient in training.
        context: what the sequences' tokens so far leave behind, for the next call with a KV cache.
        facts: what interventions may know.
    """

    def __init__(
        self, adapter: Adapter, layer: int, router: Router, facts: SiteFacts | None
    ) -> None:
        self.adapter, self.layer, self.router, self.facts = adapter, layer, router, facts
        self.scale: Tensor | None = None
        self.routing: Routing | None = None
        self.context: ContextState | None = None

    def edit(self, stream: Tensor) -> Tensor:
        """Route every token of the stream [B, S, D]; the stream itself passes unchanged."""
        intervention = self.adapter.active_intervention
        shape = self.adapter.shape
        logits, state = average_so_far(
            self._logits(stream.detach(), intervention),
            self.adapter.real_tokens(stream),
            shape.context,
            shape.decay,
            self._carried(len(stream)),
        )
        self.context = ContextState(*(part.detach() for part in state))
        routing = self.router.route(logits)
        if intervention is not None:
            routing = intervention.routing(routing, self.facts)
            intervention.ran = True
        gate = routing.gate * (shape.alpha / shape.rank)
        pairs = gate.unsqueeze(-1) * routing.mask.unsqueeze(-2)
        self.scale = pairs.flatten(-2).to(stream.dtype)
        self.routing = routing
        return stream

    def _carried(self, batch: int) -> ContextState | None:
        """The state that a KV cache's tokens left here; None at the beginning of sequences."""
        if not self.adapter.continuing:
            return None
        if self.context is None or len(self.context.total) != batch:
            raise RuntimeError(
                "the KV cache holds tokens that this adapter has not seen, and its control signal "
                "is an average over them: begin with an empty cache"
            )
        return self.context

    def _logits(self, stream: Tensor, intervention: Intervention | None) -> Tensor:
        if self.facts is None:
            normed = stream.to(torch.promote_types(stream.dtype, torch.float32))
            normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + 1e-6)
            return self.router.logits_dense(normed)
        with torch.no_grad():
            features = self.facts.sae.encode(stream)
            if intervention is not None:
                real = self.adapter.real_tokens(stream)
                features = intervention.features(features, stream, real, self.facts)
            values = features.values / self.adapter.feature_scale(self.layer)
        return self.router.logits_sparse(values, features.indices)


class Adapter(nn.Module):
    """Low-rank specialists of a base model, and the routers that weigh them.

    Parameter names, which are also the names in ``adapter_model.safetensors``:
    ``layers.<i>:<module path>.A`` and ``.B`` (module path inside decoder layer i, dots as "/"),
    ``routers.<site>.weight`` and ``.bias`` (columns: E gate logits, then R mask logits), and the
    buffer ``scales.<site>`` (mean feature norm, by which features are divided before routing).

    Args:
        model: the base model; it is frozen here, and attached to by :meth:`attach`.
        shape: what to build.
        saes: {site: SAE} for routing "sae", else unused. Frozen; they keep their own type.
        feature_scales: {site: mean L2 norm of the features}; 1 where absent.
        seed: of the initial weights.

    Raises:
        ValueError: a site beyond the last layer, a missing SAE or one of another width, a name
            that no module has, a model that carries an adapter already.
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
        generator = torch.Generator().manual_seed(seed)
        targets = find_targets(model, shape)
        width = decoder_of(model).config.hidden_size
        check_saes(shape, saes, width)
        self.shape = shape
        self.layers = nn.ModuleDict(
            {
                name: LowRank(linear.in_features, linear.out_features, total_rank(shape), generator)
                for name, (_, linear) in targets.items()
            }
        )
        self.routers, self.scales = nn.ModuleDict(), nn.ParameterDict()
        self.sites: dict[int, Site] = {}
        # Held outside the module tree: the SAEs are inputs of the adapter, not part of it.
        self.saes = _Frozen(saes)
        for site in shape.sites if shape.routing != "none" else ():
            sae = saes.get(site)
            router = Router(
                width if sae is None else sae.W_enc.shape[1],
                specialists=shape.specialists,
                rank=shape.rank,
                top_k=shape.top_k,
                temperature=shape.temperature,
                dynamic_rank=shape.dynamic_rank,
                initial_rank=shape.initial_rank,
                generator=generator,
            )
            self.routers[str(site)] = router
            scale = float((feature_scales or {}).get(site, 1.0))
            self.scales[str(site)] = nn.Parameter(torch.tensor(scale), requires_grad=False)
            facts = SiteFacts(sae, float(shape.rank), {}) if sae is not None else None
            self.sites[site] = Site(self, site, router, facts)
        self.active_intervention: Intervention | None = None
        self._attention_mask: Tensor | None = None
        self.continuing = False
        # Carrier and its own forward; in a list, so that the model is no part of this module.
        self._carriers: list[tuple[nn.Module, object]] = []
        model.requires_grad_(False)

    # Attaching and detaching

    def attach(self, model: nn.Module) -> Adapter:
        """Put the adapter into ``model``, in place; :meth:`remove` undoes it exactly."""
        decoder = decoder_of(model)
        refuse_adapted(model)
        for name, (parent, linear) in find_targets(model, self.shape).items():
            source = self._source(int(name.split(":")[0]))
            scale = self.shape.alpha / self.shape.rank
            child = name.rsplit("/", 1)[-1]
            setattr(parent, child, AdaptedLinear(linear, self.layers[name], source, scale))
        for layer, site in self.sites.items():
            decoder.layers[layer] = EditedLayer(decoder.layers[layer], site.edit)
        forward = decoder.forward

        def with_mask(input_ids=None, attention_mask=None, *args, **kwargs):
            self._attention_mask = attention_mask
            cache = kwargs.get("past_key_values", args[1] if len(args) > 1 else None)
            self.continuing = cache is not None and cache.get_seq_length() > 0
            return forward(input_ids, attention_mask, *args, **kwargs)

        self._carriers.append((model, vars(decoder).get("forward")))
        decoder.forward = with_mask
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
        for layer in self.sites:
            decoder.layers[layer] = decoder.layers[layer].layer
        for name, (parent, linear) in find_targets(model, self.shape).items():
            setattr(parent, name.rsplit("/", 1)[-1], linear.base)

    def _source(self, layer: int) -> Site | _Constant:
        below = [site for site in self.sites if site <= layer]
        return self.sites[max(below)] if below else _CONSTANT

    # What the sites ask of it

    def feature_scale(self, site: int) -> Tensor:
        """The mean feature norm of a site, a scalar."""
        return self.scales[str(site)]

    def real_tokens(self, stream: Tensor) -> Tensor:
        """True on real tokens of this forward, [B, S]; with a KV cache, the mask's end."""
        mask = self._attention_mask
        batch, length = stream.shape[:2]
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return torch.ones(batch, length, dtype=torch.bool, device=stream.device)
        return mask[:, -length:].bool()

    # What a user asks of it

    @contextmanager
    def intervention(
        self, name: str, *, seed: int = 0, domain: str | None = None
    ) -> Iterator[Intervention]:
        """Run the model with its control signal changed, inside this context only.

        Args:
            name: one of ``INTERVENTIONS``.
            seed: of the intervention's draws.
            domain: the tokens' true domain, for ``oracle_domain``.

        Raises:
            ValueError: an unknown name, an adapter that is not routed by an SAE, or an intervention
                inside another.
            RuntimeError: the context ended and no control site had run inside it.
        """
        if name not in INTERVENTIONS:
            raise ValueError(f"no intervention {name!r}: choose from {', '.join(INTERVENTIONS)}")
        if self.shape.routing != "sae":
            raise ValueError(
                "interventions act on SAE routing; this adapter's routing is "
                f"{self.shape.routing!r}"
            )
        if self.active_intervention is not None:
            running = type(self.active_intervention).__name__
            raise ValueError(f"intervention {name!r} inside another ({running}): run one at a time")
        self.active_intervention = INTERVENTIONS[name](seed=seed, domain=domain)
        try:
            yield self.active_intervention
            if not self.active_intervention.ran:
                raise RuntimeError(f"intervention {name!r}: its control site never ran inside it")
        finally:
            self.active_intervention = None

    def routing(self) -> dict[int, Routing]:
        """The last forward's gates [B, S, E] and rank masks [B, S, R] by site, detached."""
        return {
            layer: Routing(site.routing.gate.detach(), site.routing.mask.detach())
            for layer, site in self.sites.items()
            if site.routing is not None
        }

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


class _Constant:
    """The scale source of layers that no site controls."""

    scale = None


_CONSTANT = _Constant()


class _Frozen(dict):
    """{site: SAE}, frozen and in evaluation mode; a plain dict, so never in the state dict."""

    def __init__(self, saes: Mapping[int, SparseAutoencoder]) -> None:
        super().__init__({site: sae.eval().requires_grad_(False) for site, sae in saes.items()})
