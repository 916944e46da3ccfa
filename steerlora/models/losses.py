"""Auxiliary losses of a routed adapter, over real tokens, on gates that carry gradient.

T real tokens, E specialists, R rank components. Published weights: gate sparsity 1e-2, rank budget
1e-3, load balance 1e-2, specialist diversity 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from steerlora.models.lowrank import LowRank


def gate_sparsity(gate: Tensor) -> Tensor:
    """Mean entropy of the gate in nats, [T, E] -> scalar: 0 where each token has one specialist."""
    return -(gate * gate.clamp_min(1e-12).log()).sum(-1).mean()


def rank_budget(mask: Tensor) -> Tensor:
    """Mean of the rank mask, [T, R] -> scalar: the share of the rank that is spent."""
    return mask.mean()


def load_balance(gate: Tensor) -> Tensor:
    """Mean usage's squared distance from uniform, [T, E] -> sum_e (mean_t g_te - 1/E)^2."""
    return (gate.mean(0) - 1 / gate.shape[-1]).square().sum()


def specialist_diversity(layers: Iterable[LowRank], specialists: int) -> Tensor:
    """Mean squared off-diagonal cosine between specialists, over every layer's A and B.

    A's specialists are blocks of rows, B's blocks of columns; each block is one flat vector.
    """
    total, count = torch.zeros(()), 0
    for layer in layers:
        for stack in (layer.A, layer.B.t()):
            blocks = stack.reshape(specialists, -1)
            gram = blocks @ blocks.t()
            # Clamped before any root is taken: B is zero at first, where a norm has no gradient.
            norms = gram.diagonal().clamp_min(1e-12)
            cosine_squared = gram.square() / torch.outer(norms, norms)
            total = total.to(stack.device) + cosine_squared.sum() - cosine_squared.diagonal().sum()
            count += specialists * (specialists - 1)
    return total / max(count, 1)
