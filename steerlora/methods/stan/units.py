"""A frozen linear layer and the sparse units beside it.

T tokens, D_in and D_out widths of the layer, M units, K units that act on a token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.lm.targets import ReplacedLinear
from steerlora.methods.stan.config import StanConfig
from steerlora.methods.stan.forward import LayerForward
from steerlora.methods.stan.gates import most_active, redrawn, threshold_for
from steerlora.saes.sparse import SparseFeatures, sparse_decode, sparse_encode, top_k

GATHERED_FROM = {"cpu": 32}
"""{device: M / K from which gathering the K rows of D is cheaper than multiplying by all M}.
Measured on one core, forward and backward of 512 tokens, widths 128 and 576: at M / K = 16 the two
take alike, at 64 gathering takes half the time or less; ``scripts/bench_adapter.py`` has both."""
GATHERED_ELSEWHERE = 256
"""On accelerators; from what they multiply and what they read a second, not measured."""
GATHERED_TOKENS = 64
"""Fewer tokens than this, as in cached decoding, are multiplied by all units: E x costs the most
then, and it is dense in both ways."""


class Units(nn.Module):
    """The matrices of one adapted layer, and what its gate remembers.

    Attributes:
        count: M; a number of its own, since a sharded weight has no shape between its uses.
        encoder: E, [M, D_in]; a parameter where it is learnt, a buffer where it is frozen, None
            where an SAE is in its place.
        decoder: D transposed, [M, D_out]: row j is what unit j writes. Zero at first, so that the
            adapter starts as the base.
        kept: [M] bool, the units that may act, of the gates "static" and "chosen".
        fired: [M], on how many tokens each acted, of "chosen".
        threshold: [1], of "threshold".
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        config: StanConfig,
        generator: torch.Generator | None = None,
        latents: int | None = None,
    ) -> None:
        super().__init__()
        self.count = count = config.units if latents is None else latents
        bound = 1 / math.sqrt(d_in)  # Kaiming-uniform with a = sqrt(5), as LoRA's A
        encoder = torch.empty(count, d_in).uniform_(-bound, bound, generator=generator)
        if config.encoder == "learnt":
            self.encoder = nn.Parameter(encoder)
        else:
            self.register_buffer("encoder", encoder if config.encoder == "frozen" else None)
        self.decoder = nn.Parameter(torch.zeros(count, d_out))
        if config.gate == "static":
            drawn = torch.rand(count, generator=generator)
            self.register_buffer("kept", most_active(drawn, config.k))
        if config.gate == "chosen":
            self.register_buffer("kept", torch.ones(count, dtype=torch.bool))
            self.register_buffer("fired", torch.zeros(count))
        if config.gate == "threshold":
            self.register_buffer("threshold", torch.zeros(1))


class StanLinear(ReplacedLinear):
    """y = W x + factor * D TopK_k(E x).

    The update is one of two things that are equal: a product with a [T, M] code that is zero but
    for K entries a token, or a sum of K gathered rows, whose backward touches those alone.

    Args:
        base: the frozen linear layer.
        units: E and D.
        forward: what is known of the forward that runs.
        config: of the adapter.
    """

    def __init__(
        self, base: nn.Linear, units: Units, forward: LayerForward, config: StanConfig
    ) -> None:
        super().__init__(base)
        self.units, self.known, self.config = units, forward, config

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        # Flat throughout: in-place accumulation into a view would cost a copy in the backward.
        flat = x.reshape(-1, x.shape[-1])
        output = self.base(flat)
        if not self.known.disabled:
            if self.gathers(flat):
                output = output + self._gathered_update(flat).to(output.dtype)
            else:
                code = self._gated_code(x, flat) * self.config.factor
                output.addmm_(code.to(output.dtype), self.units.decoder.to(output.dtype))
        return output.view(*x.shape[:-1], -1)

    def gathers(self, x: Tensor) -> bool:
        """Whether gathering is the cheaper way for so many tokens and units, and is enough."""
        least = GATHERED_FROM.get(x.device.type, GATHERED_ELSEWHERE)
        wide = len(x) >= GATHERED_TOKENS and self.units.count >= least * self.config.k
        state = self.known.state
        return wide and state.gate == "token" and state.active is None and not state.off

    @torch.compiler.disable  # it has a backward of its own
    def _gathered_update(self, x: Tensor) -> Tensor:
        table = self.units.decoder
        values, indices = self.gathered_code(x)
        values = values * self.config.factor
        return sparse_decode(SparseFeatures(values.to(table.dtype), indices), table)

    def gathered_code(self, x: Tensor) -> SparseFeatures:
        """TopK_k(E x) as its K entries: [T, D_in] -> [T, K]; x in the type of E."""
        encoder = self.units.encoder
        if encoder is None:
            return self._of_sae(x.device)
        x = x.to(encoder.dtype)
        if self.config.select == "absolute":
            return self._chosen(F.linear(x, encoder))
        no_bias, no_shift = x.new_zeros(self.units.count), x.new_zeros(x.shape[1])
        return sparse_encode(x, encoder.t(), no_bias, no_shift, self.config.k)

    def masked_code(self, x: Tensor) -> Tensor:
        """TopK_k(E x) with a column for every unit: [T, D_in] -> [T, M]."""
        if self.units.encoder is None:
            return self._of_sae(x.device).dense(self.units.count)
        return self._token_code(F.linear(x, self.units.encoder.to(x.dtype)))

    def _token_code(self, scores: Tensor) -> Tensor:
        """Of scores E x: [T, M] -> [T, M]."""
        values, indices = self._chosen(scores)
        return torch.zeros_like(scores).scatter(-1, indices, values)

    def _chosen(self, scores: Tensor) -> SparseFeatures:
        """The K entries of scores [T, M] that ``select`` means."""
        if self.config.select == "absolute":
            indices = top_k(scores.detach().abs(), self.config.k).indices
            return SparseFeatures(scores.gather(-1, indices), indices)
        values, indices = scores.topk(self.config.k, dim=-1, sorted=False)
        return SparseFeatures(values.relu(), indices)

    def _of_sae(self, device: torch.device) -> SparseFeatures:
        """The K strongest of the site's features, [T, K]."""
        values, indices = (part.to(device) for part in self.known.features)
        kept = values.topk(min(self.config.k, values.shape[-1]), dim=-1, sorted=False)
        return SparseFeatures(kept.values, indices.gather(-1, kept.indices))

    def _gated_code(self, x: Tensor, flat: Tensor) -> Tensor:
        """The code of x [..., D_in], whichever the gate: [T, M]."""
        state, units, config = self.known.state, self.units, self.config
        if state.gate == "token":
            code = self.masked_code(flat)
        else:
            scores = F.linear(flat, units.encoder.to(flat.dtype))
            code = self._controlled_code(x, scores)
            if torch.is_grad_enabled() and state.gate in ("chosen", "threshold"):
                real = self.known.real(x)
                state.noted[self.known.name] = (
                    threshold_for(scores, real, config.k)
                    if state.gate == "threshold"
                    else (code.detach()[real] != 0).sum(0)
                )
        off = state.off.get(self.known.name)
        if off is not None:
            code = code.index_fill(-1, off.to(code.device), 0)
        if state.active is not None:
            state.active[self.known.name] = (code.detach() != 0).view(*x.shape[:-1], -1)
        return code

    def _controlled_code(self, x: Tensor, scores: Tensor) -> Tensor:
        """The code under a gate other than "token": scores [T, M] -> [T, M]."""
        gate, units = self.known.state.gate, self.units
        if gate == "threshold":
            return (scores - units.threshold.to(scores.dtype)).relu()
        if gate in ("static", "chosen"):
            # Of those that may not act, none is among the k largest: as many as k may.
            lowest = 0.0 if self.config.select == "absolute" else -torch.inf
            return self._token_code(scores.masked_fill(~units.kept, lowest))
        outputs = scores if self.config.select == "absolute" else scores.relu()
        own, real = self._token_code(scores), self.known.real(x)
        return redrawn(own, outputs, real, self.known.generator(x.device), how=gate)
