"""A control site at work: reads the stream, routes it, and holds the result for its layers.

B batch, S sequence, D model width, N latents, K active latents, E specialists, R rank components,
M adapted modules of the site.

Where the signal is an average over earlier tokens, a KV cache has to bring them along. It does so
in a layer of its own (``lm/caches.py``) with two things in it. One is the signal of every token: K
values and K latents, not N sums. The other is the router's state after the last token, by which the
next one costs no more than itself. Beams, copies and repetitions of the cache go through both.
Where tokens are taken back (``crop``), the state is computed again from the signals that stay, just
as a forward without a cache computes it: nothing is subtracted, so nothing of what was taken back
is left, not even a rounding error.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from steerlora.lm.caches import TokensLayer, is_empty
from steerlora.methods.attached import ForwardState, Running
from steerlora.methods.routed_lora.interventions import SiteFacts
from steerlora.methods.routed_lora.routing import RouterState, Routing
from steerlora.saes.sparse import SparseFeatures

if TYPE_CHECKING:
    from steerlora.methods.routed_lora.adapter import Adapter


class SeenTokens(NamedTuple):
    """What a KV cache keeps of tokens for a control site.

    Attributes:
        signal: as the router read it, features [B, S, K] or a dense signal [B, S, D].
        counted: [B, S] bool, which of them carry a signal.
    """

    signal: SparseFeatures | Tensor
    counted: Tensor


@dataclass
class SiteForward:
    """What a site found in one forward.

    Attributes:
        scales: [B, S, E*R], one a router: (alpha / R) * gate outer mask.
        columns: the pairs that any token uses, one list a router, where the others are left out of
            the products; None: none are.
        features: in units of their mean norm; None: dense routing.
        routing: gate and mask, with gradient in training.
        seen: what a KV cache keeps of the tokens.
        state: what the sequences' tokens so far leave behind; of nothing but None: no need to keep.
    """

    scales: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] | None = None
    features: SparseFeatures | None = None
    routing: Routing | None = None
    seen: SeenTokens | None = None
    state: RouterState | None = None


@dataclass
class CurrentForward(ForwardState):
    """What all sites of an adapter know of one forward."""

    base_streams: dict[int, Tensor] = field(default_factory=dict)
    """{site: stream} to read in place of the current ones."""
    base_cache: Cache | None = None
    """Of the forward that those came from."""
    sites: dict[int, SiteForward] = field(default_factory=lambda: defaultdict(SiteForward))

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
        running: the adapter's forwards.
        site: that controls the module; None: no site does, and its scale is a constant.
        index: of the module among the site's routers; 0 where they share one.
    """

    def __init__(self, running: Running, site: int | None, index: int) -> None:
        self.running, self.site, self.index = running, site, index

    @property
    def disabled(self) -> bool:
        return self.running.disabled

    @property
    def scale(self) -> Tensor | None:
        return None if self.site is None else self._found().scales[self.index]

    @property
    def columns(self) -> Tensor | None:
        columns = None if self.site is None else self._found().columns
        return None if columns is None else columns[self.index]

    def _found(self) -> SiteForward:
        return self.running.forward.sites[self.site]


class Site:
    """One control site.

    Attributes:
        facts: what interventions may know; None: dense routing.
    """

    def __init__(self, adapter: Adapter, layer: int, facts: SiteFacts | None) -> None:
        self.adapter, self.layer, self.facts = adapter, layer, facts

    @property
    def found(self) -> SiteForward:
        """What it found in this thread's last forward."""
        return self.adapter.forward_state.sites[self.layer]

    @property
    def routing(self) -> Routing | None:
        """The gate and mask found last, with gradient in training."""
        return self.found.routing

    @property
    def features(self) -> SparseFeatures | None:
        """The features found last, in units of their mean norm; None: dense routing."""
        return self.found.features

    def edit(self, stream: Tensor) -> Tensor:
        """Route every token of the stream [B, S, D]; the stream itself passes unchanged.

        A token that carries no signal (``adapter.signal_tokens``) is read as one whose features are
        all zero: it is routed by its context where that is an average, and otherwise, or before any
        token that carries one, by what the router does of itself (a learnt one by its bias).

        Where rows are assigned to specialists, the router has no say.
        """
        assigned = self.adapter.assignment()
        if assigned is not None:
            self._use(self._assigned(assigned, stream), stream)
            return stream
        forward, found = self.adapter.forward_state, self.found
        read = forward.base_streams.get(self.layer, stream).detach()
        read = read.to(self.adapter.active.device)  # where routers and SAEs are
        counted = self.adapter.tokens_with_signal(read)
        signal = self.signal(read, counted)
        before = self._state_so_far(forward, len(stream))
        active = self.adapter.active_at(self.layer)
        restarts = forward.restarts(forward.real_tokens(read))
        routing, found.state = self.router(signal, counted, active, before, restarts)
        found.seen = SeenTokens(signal, counted)
        if not is_empty(found.state):
            _refuse_unknown(forward, before)
        self._use(self._controlled(routing), stream)
        return stream

    def _assigned(self, specialists: Tensor, stream: Tensor) -> Routing:
        """Every token of row b to ``specialists[b]``, at full rank."""
        config = self.adapter.config
        gate = F.one_hot(specialists.to(stream.device), config.specialists).to(stream.dtype)
        gate = gate.unsqueeze(1).expand(*stream.shape[:2], -1)
        return Routing(gate, torch.ones_like(gate[..., :1]).expand(*gate.shape[:2], config.rank))

    @property
    def router(self) -> nn.Module:
        return self.adapter.routers[str(self.layer)]

    def signal(self, stream: Tensor, counted: Tensor) -> SparseFeatures | Tensor:
        """What the router reads of a stream [B, S, D]: features [B, S, K], or the stream normed.

        It is zero where a token is not ``counted`` [B, S].
        """
        blank = ~counted.unsqueeze(-1)
        if self.facts is None:
            stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
            scale = torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)
            return (stream * scale).masked_fill(blank, 0)
        intervention = self.adapter.running.intervention
        with torch.no_grad():
            features = self.facts.sae.encode(stream)
            if intervention is not None:
                features = intervention.apply_features(
                    features, stream, counted, self.facts, self.layer
                )
            values = features.values / self.adapter.scales[str(self.layer)]
            values = values.masked_fill(blank, 0)
            self.found.features = SparseFeatures(values, features.indices)
        return self.found.features

    def keep(self, cache: Cache | None) -> None:
        """Add the last forward's tokens to its KV cache, where later ones need to know them."""
        forward, found = self.adapter.forward_state, self.found
        if cache is not None and not is_empty(found.state):
            layer = TokensLayer.at(cache, f"site {self.layer}")
            if not forward.continuing:
                layer.reset()
            layer.append(found.seen, found.state)
        found.seen = found.state = None

    @torch.no_grad()
    def _state_so_far(self, forward: CurrentForward, batch: int) -> RouterState | None:
        """What a KV cache's tokens left behind; None: nothing that is known."""
        layer = TokensLayer.of(forward.cache, f"site {self.layer}")
        if not forward.continuing or layer is None or layer.get_seq_length() != forward.past:
            return None
        signal, counted = layer.tokens
        if len(counted) != batch:
            return None
        if layer.together is None:  # some tokens were taken back
            active = self.adapter.active_at(self.layer)
            _, layer.together = self.router(signal, counted, active)
        return layer.together

    def _controlled(self, routing: Routing) -> Routing:
        intervention = self.adapter.running.intervention
        if intervention is None:
            return routing
        self.facts.active = self.adapter.active_at(self.layer)
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
        found = self.found
        found.columns = None
        # Looking which pairs are in use pays only where whole columns can be expected not to be.
        if no_gradient and (config.hard_rank or self.router.leaves_out):
            used = [(scale != 0).flatten(0, -2).any(0) for scale in scales]
            found.columns = tuple(columns.nonzero().flatten() for columns in used)
            scales = tuple(
                scale[..., columns] for scale, columns in zip(scales, found.columns, strict=True)
            )
        found.scales, found.routing = scales, routing


def _refuse_unknown(forward: CurrentForward, before: RouterState | None) -> None:
    """RuntimeError where routing needs earlier tokens, and they are not known."""
    if forward.mixed:
        raise RuntimeError(
            "the control signal is an average over earlier tokens, which continuous batching does "
            "not bring along: use generate()"
        )
    if forward.continuing and before is None:
        raise RuntimeError(
            "the KV cache holds tokens that this adapter has not seen, and its control signal is "
            "an average over them: begin with an empty cache"
        )
