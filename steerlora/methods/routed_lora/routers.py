"""From control signal to gate and rank mask, learnt (paper, section 3).

B batch, S sequence, N latents, K active latents, E specialists, R rank components, H hidden width,
M modules that have a router of their own (1 where a site's modules share one).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.methods.routed_lora.context import average_so_far
from steerlora.methods.routed_lora.prototypes import cosines_so_far
from steerlora.methods.routed_lora.routing import RouterState, Routing, router
from steerlora.saes.sparse import SparseFeatures, is_dense, sparse_decode

GATE_EPSILON = 1e-8
"""Added to the denominator when the kept gates are renormalised."""
MASK_FLOOR = 1e-4
"""Smallest sigmoid factor of the rank mask, so that its products keep a gradient."""


def top_k_gate(
    logits: Tensor,
    top_k: int,
    temperature: float,
    active: Tensor | None = None,
    similarity: Tensor | None = None,
) -> Tensor:
    """g = renorm(top_k(softmax(logits / tau))), over the last dimension: [..., E] -> [..., E].

    Args:
        logits: [..., E].
        top_k: specialists kept; E keeps all.
        temperature: tau.
        active: [E] or [M, E] bool; the softmax is over these specialists alone. None: all.
        similarity: [..., E] in [-1, 1]; every probability is multiplied by (1 + similarity) / 2
            before the best are chosen.
    """
    if active is not None:
        logits = logits.masked_fill(~active, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if similarity is not None:
        probabilities = probabilities * ((1 + similarity) / 2)
    if top_k < logits.shape[-1]:
        kept = probabilities.topk(top_k, dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter(-1, kept.indices, kept.values)
    return probabilities / (probabilities.sum(-1, keepdim=True) + GATE_EPSILON)


def monotone_mask(logits: Tensor) -> Tensor:
    """m_j = prod_{i <= j} max(sigmoid(logits_i), ``MASK_FLOOR``): [..., R] -> [..., R]."""
    return torch.sigmoid(logits).clamp_min(MASK_FLOOR).cumprod(-1)


def rank_bias(rank: int, effective_rank: float) -> float:
    """The bias b at which R equal factors give sum_j sigmoid(b)^j = ``effective_rank``.

    Zero would start a rank-16 adapter at an effective rank of about 1.
    """

    def gap(bias: float) -> float:
        factor = 1 / (1 + math.exp(-bias))
        return sum(factor**j for j in range(1, rank + 1)) - effective_rank

    return brentq(gap, -20.0, 20.0)


class Router(nn.Module):
    """What learnt routers share: the context of the signal, the gate, the mask, the prototypes.

    A sub-class gives ``project``, an affine map of the signal, and ``logits``, a function of its
    output. An affine map commutes with averaging, so a running average of the signal costs no more
    than one of the projection, and a KV cache keeps that.

    Args:
        width: N for SAE features, D for a dense hidden state.
        config: the adapter's.

    Attributes:
        prototypes: [E, width], one a specialist, with ``config.prototypes``; zero rows reweight
            nothing.
    """

    def __init__(self, width: int, config: RoutedLoRAConfig) -> None:
        super().__init__()
        self.config = config
        if config.prototypes:
            self.register_buffer("prototypes", torch.zeros(config.specialists, width))

    fitted = False
    """It takes the signals of each domain's training text before the domain trains (``fit``)."""
    leaves_out = False
    """Whole specialists can be expected to have no token of a batch."""

    def available(self) -> Tensor | None:
        """[E] bool, the specialists that it may choose by itself; None: the active ones."""
        return None

    def project(self, signal: SparseFeatures | Tensor) -> Tensor:
        """[B, S, K] features or [B, S, width] -> [B, S, outputs]."""
        raise NotImplementedError

    def logits(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate logits [..., (M,) E], and mask logits [..., (M,) R] with dynamic rank."""
        raise NotImplementedError

    def forward(
        self,
        signal: SparseFeatures | Tensor,
        counted: Tensor,
        active: Tensor,
        state: RouterState | None = None,
        restarts: Tensor | None = None,
    ) -> tuple[Routing, RouterState]:
        """Route every token by the signal's average over its context.

        Args:
            signal: features, values and indices [B, S, K], or a dense signal [B, S, width].
            counted: [B, S], True on tokens that carry a signal.
            active: [E], True on the specialists that may be used; [M, E] where every module has its
                own.
            state: of the same sequences, where these tokens continue them.
            restarts: [B, S], True where another sample begins in the same row (packing).
        """
        config = self.config
        averaged, summed = average_so_far(
            self.project(signal),
            counted,
            config.context,
            config.decay,
            state and state.signal,
            restarts,
        )
        gate_logits, mask_logits = self.logits(averaged)
        similarity = compared = None
        if config.prototypes:
            cosines, compared = cosines_so_far(
                signal,
                self.prototypes,
                torch.zeros_like(self.prototypes[0]),
                counted,
                config,
                state and state.similarity,
                restarts,
            )
            similarity = cosines.unsqueeze(-2) if gate_logits.dim() > cosines.dim() else cosines
        gate = top_k_gate(gate_logits, config.top_k, config.temperature, active, similarity)
        if mask_logits is not None:
            mask = monotone_mask(mask_logits)
        else:
            mask = torch.ones_like(gate[..., :1]).expand(*gate.shape[:-1], config.rank)
        return Routing(gate, mask), RouterState(summed, compared)

    def set_prototypes(self, prototypes: Tensor) -> None:
        """Take the domains' prototypes [domains, width]; domain d's goes to specialist d modulo E.

        Raises:
            ValueError: not a matrix of this width. (A single vector would broadcast, and reweight
                nothing.)
        """
        if prototypes.dim() != 2 or prototypes.shape[1] != self.prototypes.shape[1]:
            raise ValueError(
                f"prototypes must be [domains, {self.prototypes.shape[1]}]; got "
                f"{list(prototypes.shape)}"
            )
        owners = torch.arange(len(prototypes), device=prototypes.device) % self.config.specialists
        self.prototypes.zero_().index_add_(0, owners, prototypes.to(self.prototypes))


@router("linear")
class LinearRouter(Router):
    """Gate and mask logits as one linear map of the signal.

    Attributes:
        weight: [width, outputs], signal-major, so that a sparse signal reads only the rows of its K
            active latents (an embedding bag). The columns are E gate logits, then with dynamic
            rank R mask logits; with M > 1 that M times over.
        bias: [outputs].
    """

    def __init__(
        self, width: int, config: RoutedLoRAConfig, modules: int, generator: torch.Generator
    ) -> None:
        super().__init__(width, config)
        self.count = modules
        outputs = config.specialists + (config.rank if config.dynamic_rank else 0)
        self.weight = nn.Parameter(torch.zeros(width, modules * outputs))
        self.bias = nn.Parameter(torch.zeros(modules * outputs))
        with torch.no_grad():
            weight = self.weight.view(width, modules, outputs)
            bias = self.bias.view(modules, outputs)
            # Small, not zero: equal logits would send every token to the same top-k specialists.
            weight[..., : config.specialists].normal_(0, 0.1, generator=generator)
            if config.dynamic_rank:
                bias[:, config.specialists :] = rank_bias(
                    config.rank, config.initial_rank * config.rank
                )

    def project(self, signal):
        if not isinstance(signal, SparseFeatures):
            return signal.to(self.weight.dtype) @ self.weight + self.bias
        if is_dense(signal, len(self.weight)):
            dense = signal.dense(len(self.weight))
            return dense.to(self.weight.dtype) @ self.weight + self.bias
        active = signal.values.shape[-1]
        flat = F.embedding_bag(
            signal.indices.reshape(-1, active),
            self.weight,
            per_sample_weights=signal.values.reshape(-1, active).to(self.weight.dtype),
            mode="sum",
        )
        return flat.view(*signal.values.shape[:-1], -1) + self.bias

    def logits(self, projected):
        if self.config.per_module:
            projected = projected.unflatten(-1, (self.count, -1))
        gate, mask = projected.split(
            [self.config.specialists, projected.shape[-1] - self.config.specialists], dim=-1
        )
        return gate, mask if self.config.dynamic_rank else None


@router("mlp")
class MLPRouter(Router):
    """Two-layer perceptrons with GELU, one for the gate and one for the mask of each module.

    All first layers are one table, so that a sparse signal costs K rows of it a token, and all
    second layers one batched product: no loop over modules.

    Attributes:
        hidden_weight: [width, M, P]; the last dimension holds the H units of the gate's perceptron,
            then with dynamic rank the H' of the mask's, so P is H or H + H'.
        hidden_bias: [M, P].
        gate_weight, gate_bias: [M, H, E], [M, E].
        rank_weight, rank_bias: [M, H', R], [M, R], with dynamic rank.
    """

    def __init__(
        self, width: int, config: RoutedLoRAConfig, modules: int, generator: torch.Generator
    ) -> None:
        super().__init__(width, config)
        hidden, of_rank = config.router_hidden, config.rank_hidden or config.router_hidden
        units = hidden + of_rank * config.dynamic_rank
        # The signal has about unit norm, so unit weights give units of about unit size.
        self.hidden_weight = nn.Parameter(
            torch.empty(width, modules, units).normal_(generator=generator)
        )
        self.hidden_bias = nn.Parameter(torch.zeros(modules, units))
        scale = 1 / math.sqrt(hidden)
        self.gate_weight = nn.Parameter(
            torch.empty(modules, hidden, config.specialists).normal_(0, scale, generator=generator)
        )
        self.gate_bias = nn.Parameter(torch.zeros(modules, config.specialists))
        if config.dynamic_rank:
            self.rank_weight = nn.Parameter(torch.zeros(modules, of_rank, config.rank))
            bias = rank_bias(config.rank, config.initial_rank * config.rank)
            self.rank_bias = nn.Parameter(torch.full((modules, config.rank), bias))

    def project(self, signal):
        table = self.hidden_weight.flatten(1)
        if not isinstance(signal, SparseFeatures):
            return signal.to(table.dtype) @ table + self.hidden_bias.flatten()
        flat = SparseFeatures(
            *(part.reshape(-1, part.shape[-1]) for part in (signal.values, signal.indices))
        )
        flat = SparseFeatures(flat.values.to(table.dtype), flat.indices)
        projected = sparse_decode(flat, table) + self.hidden_bias.flatten()
        return projected.view(*signal.values.shape[:-1], -1)

    def logits(self, projected):
        config, (modules, hidden, _) = self.config, self.gate_weight.shape
        units = F.gelu(projected.unflatten(-1, (modules, -1)))
        gate = self._second(units[..., :hidden], self.gate_weight, self.gate_bias)
        if not config.dynamic_rank:
            return gate, None
        return gate, self._second(units[..., hidden:], self.rank_weight, self.rank_bias)

    def _second(self, units: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[..., M, H] -> [..., M, outputs]; without M where the modules share the router."""
        if not self.config.per_module:
            return units.squeeze(-2) @ weight[0] + bias[0]
        return torch.einsum("bsmh,mho->bsmo", units, weight) + bias
