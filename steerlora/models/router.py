"""From control signal to gate and rank mask (DESIGN: the method; paper section 3).

B batch, S sequence, T = B*S tokens, D model width, N latents, K active latents, E specialists,
R rank components.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

GATE_EPSILON = 1e-8
"""Added to the denominator when the kept gates are renormalised."""
MASK_FLOOR = 1e-4
"""Smallest sigmoid factor of the rank mask, so that its products keep a gradient."""


class Routing(NamedTuple):
    """What a router decides for every token.

    Attributes:
        gate: [..., E] weights over specialists, summing to one.
        mask: [..., R] non-increasing weights over rank components, in (0, 1]; ones where the
            adapter has no dynamic rank.
    """

    gate: Tensor
    mask: Tensor


def top_k_gate(logits: Tensor, top_k: int, temperature: float) -> Tensor:
    """g = renorm(top_k(softmax(logits / tau))), over the last dimension: [..., E] -> [..., E]."""
    probabilities = torch.softmax(logits / temperature, dim=-1)
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
    """A linear map from a control signal to gate and rank mask.

    The weight is stored latent-major, [signal width, E + R], so that a sparse signal reads only the
    rows of its K active latents (an embedding bag) and a dense one is a plain matrix product. Its
    columns are the gate logits G, then (with ``dynamic_rank``) the mask logits R.

    Args:
        width: N for SAE features, D for a dense hidden state.
        specialists: E.
        rank: R.
        top_k: specialists kept per token.
        temperature: tau of the gate's softmax.
        dynamic_rank: learn the rank mask; otherwise it is one everywhere.
        initial_rank: effective rank sum_j m_j at initialisation, as a fraction of R.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        width: int,
        *,
        specialists: int,
        rank: int,
        top_k: int,
        temperature: float = 1.0,
        dynamic_rank: bool = True,
        initial_rank: float = 0.75,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.specialists, self.rank = specialists, rank
        self.top_k, self.temperature, self.dynamic_rank = top_k, temperature, dynamic_rank
        outputs = specialists + (rank if dynamic_rank else 0)
        self.weight = nn.Parameter(torch.zeros(width, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        with torch.no_grad():
            # Small, not zero: equal logits would send every token to the same top-k specialists.
            self.weight[:, :specialists].normal_(0, 0.1, generator=generator)
            if dynamic_rank:
                self.bias[specialists:] = rank_bias(rank, initial_rank * rank)

    def logits_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """Logits of sparse signals: values and indices [..., K] -> [..., E (+ R)]."""
        active = values.shape[-1]
        flat = F.embedding_bag(
            indices.reshape(-1, active),
            self.weight,
            per_sample_weights=values.reshape(-1, active).to(self.weight.dtype),
            mode="sum",
        )
        return flat.view(*values.shape[:-1], -1) + self.bias

    def logits_dense(self, signal: Tensor) -> Tensor:
        """Logits of dense signals: [..., width] -> [..., E (+ R)]."""
        return signal.to(self.weight.dtype) @ self.weight + self.bias

    def route(self, logits: Tensor) -> Routing:
        """Gate and rank mask of logits [..., E (+ R)]."""
        gate = top_k_gate(logits[..., : self.specialists], self.top_k, self.temperature)
        if self.dynamic_rank:
            return Routing(gate, monotone_mask(logits[..., self.specialists :]))
        return Routing(gate, torch.ones_like(gate[..., :1]).expand(*gate.shape[:-1], self.rank))
