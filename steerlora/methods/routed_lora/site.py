"""A control site at work: reads the stream, routes it, and holds the result for its layers.

B batch, S sequence, D model width, N latents, K active latents, E specialists, R rank components,
M adapted modules of the site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steerlora.methods.base import ForwardState
from steerlora.methods.routed_lora.interventions import Intervention, SiteFacts
from steerlora.methods.routed_lora.routing import RouterState, Routing
from steerlora.saes.sparse import SparseFeatures

if TYPE_CHECKING:
    from steerlora.methods.routed_lora.adapter import Adapter


@dataclass
class CurrentForward(ForwardState):
    """What all sites of an adapter know of the forward that is running."""

    base_streams: dict[int, Tensor] = field(default_factory=dict)
    """{site: stream} to read in place of the current ones."""
    intervention: Intervention | None = None
    """The control that acts."""

    def restarts(self, real: Tensor) -> Tensor | None:
        """True where a packed row goes on with another sample: its positions do not go on, [B, S].

        None where the caller gave no positions, so that nothing is packed.
        """
        positions = self.position_ids
        if positions is None or positions.dim() != 2 or positions.shape[1] < 2:
            return None
        found = torch.zeros_like(real)
        broken = positions[:, 1:] != positions[:, :-1] + 1
        found[:, 1:] = broken & real[:, 1:] & real[:, :-1]
        return found


class ModuleScale:
    """The scale source of one adapted module (see ``lowrank.py``).

    Args:
        forward: what runs.
        site: that controls the module; None: no site does, and its scale is a constant.
        index: of the module among the site's routers; 0 where they share one.
    """

    def __init__(self, forward: CurrentForward, site: Site | None, index: int) -> None:
        self.forward, self.site, self.index = forward, site, index

    @property
    def disabled(self) -> bool:
        return self.forward.disabled

    @property
    def scale(self) -> Tensor | None:
        return self.site.scales[self.index] if self.site else None

    @property
    def columns(self) -> Tensor | None:
        if self.site is None or self.site.columns is None:
            return None
        return self.site.columns[self.index]


class Site:
    """One control site.

    Attributes:
        scales: [B, S, E*R] of the current forward, one a router: (alpha / R) * gate outer mask.
        columns: the pairs that any token uses, one list a router, where the others are left out of
            the products; None: none are.
        features: the current forward's features, in units of their mean norm; None: dense routing.
        routing: the current forward's gate and mask, with gradient in training.
        context: what the sequences' tokens so far leave behind, for the next call with a KV cache.
        facts: what interventions may know; None: dense routing.
    """

    def __init__(self, adapter: Adapter, layer: int, facts: SiteFacts | None) -> None:
        self.adapter, self.layer, self.facts = adapter, layer, facts
        self.forward = adapter.forward_state
        self.scales: tuple[Tensor, ...] = ()
        self.columns: tuple[Tensor, ...] | None = None
        self.features: SparseFeatures | None = None
        self.routing: Routing | None = None
        self.context: RouterState | None = None

    def edit(self, stream: Tensor) -> Tensor:
        """Route every token of the stream [B, S, D]; the stream itself passes unchanged."""
        read = self.forward.base_streams.get(self.layer, stream).detach()
        read = read.to(self.adapter.active.device)  # where routers and SAEs are
        real = self.forward.real_tokens(read)
        routing, state = self.router(
            self.signal(read, real),
            real,
            self.adapter.active,
            self._state_so_far(len(stream)),
            self.forward.restarts(real),
        )
        self.context = _detached(state)
        self._use(self._controlled(routing), stream)
        return stream

    @property
    def router(self) -> nn.Module:
        return self.adapter.routers[str(self.layer)]

    def signal(self, stream: Tensor, real: Tensor) -> SparseFeatures | Tensor:
        """What the router reads of a stream [B, S, D]: features [B, S, K], or the stream normed."""
        if self.facts is None:
            stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
            return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)
        intervention = self.forward.intervention
        with torch.no_grad():
            features = self.facts.sae.encode(stream)
            if intervention is not None:
                features = intervention.apply_features(
                    features, stream, real, self.facts, self.layer
                )
            values = features.values / self.adapter.scales[str(self.layer)]
            self.features = SparseFeatures(values, features.indices)
        return self.features

    def _state_so_far(self, batch: int) -> RouterState | None:
        """The state that a KV cache's tokens left here; None at the beginning of sequences."""
        if not self.forward.continuing:
            return None
        kept = self.context and self.context.signal
        if self.context is None or (kept is not None and len(kept.total) != batch):
            raise RuntimeError(
                "the KV cache holds tokens that this adapter has not seen, and its control signal "
                "is an average over them: begin with an empty cache"
            )
        return self.context

    def _controlled(self, routing: Routing) -> Routing:
        intervention = self.forward.intervention
        if intervention is None:
            return routing
        self.facts.active = self.adapter.active
        return intervention.apply_routing(routing, self.facts, self.layer)

    def _use(self, routing: Routing, stream: Tensor) -> None:
        config, no_gradient = self.adapter.config, not torch.is_grad_enabled()
        if config.hard_rank and no_gradient:
            mask = routing.mask
            routing = routing._replace(mask=mask * (mask >= config.hard_rank))
        gate = routing.gate * (config.alpha / config.rank)
        pairs = gate.unsqueeze(-1) * routing.mask.unsqueeze(-2)
        scale = pairs.flatten(-2).to(stream.dtype)
        scales = scale.unbind(-2) if config.per_module else (scale,)
        self.columns = None
        # Looking which pairs are in use pays only where whole columns can be expected not to be.
        if no_gradient and (config.hard_rank or self.router.leaves_out):
            used = [(scale != 0).flatten(0, -2).any(0) for scale in scales]
            self.columns = tuple(columns.nonzero().flatten() for columns in used)
            scales = tuple(
                scale[..., columns] for scale, columns in zip(scales, self.columns, strict=True)
            )
        self.scales = scales
        self.routing = routing


def _detached(state: RouterState) -> RouterState:
    parts = ((part and type(part)(*(tensor.detach() for tensor in part))) for part in state)
    return RouterState(*parts)
