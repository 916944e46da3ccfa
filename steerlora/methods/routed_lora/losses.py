"""Auxiliary losses of an adapter, on gates and features that have a gradient.

T tokens that carry a signal, E specialists, R rank components, N latents, K active latents,
D domains. ``...`` is nothing, or the adapted modules where each has a router of its own.

Published weights: preservation 1, steering 1, gate sparsity 1e-2, rank budget 1e-3, load balance
1e-2, specialist diversity 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from steerlora.methods.lowrank import LowRank
from steerlora.methods.monitor import squared_change
from steerlora.saes.sparse import SparseFeatures


def preservation(adapted: SparseFeatures, base: SparseFeatures, general: Tensor) -> Tensor:
    """Mean over tokens and latents of ((z_ft - z_base) * M_general)^2.

    Args:
        adapted: z_ft, [T, K]; the gradient goes into its values.
        base: z_base of the same tokens, [T, K'].
        general: M_general, [N] bool.
    """
    return squared_change(adapted, base, general) / (max(len(base.values), 1) * len(general))


def steering(adapted: SparseFeatures, prototypes: Tensor, masks: Tensor, domains: Tensor) -> Tensor:
    """Mean over tokens and latents of ((z_ft - p_d) * M_d)^2, d being the token's domain.

    Expanded as sum_n M_d p_d^2, a constant of the domain, plus M_d z (z - 2 p_d) at the active
    latents alone: O(T K). Tokens of no domain (-1) are left out; zero where none is left.

    Args:
        adapted: z_ft, [T, K]; the gradient goes into its values.
        prototypes: p, [D, N].
        masks: M, [D, N] bool.
        domains: [T] int64, each in [-1, D).
    """
    values, indices = adapted
    prototypes = prototypes.to(values.dtype)
    owned, rows = domains >= 0, domains.clamp_min(0)
    own = masks[rows[:, None], indices] & (values > 0)
    active = values * (values - 2 * prototypes[rows[:, None], indices]) * own
    silent = (prototypes.square() * masks).sum(1)[rows]
    total = ((active.sum(1) + silent) * owned).sum()
    return total / (owned.sum().clamp_min(1) * prototypes.shape[1])


def gate_sparsity(gate: Tensor) -> Tensor:
    """Mean entropy of the gate in nats, [T, ..., E]: 0 where each token has one specialist."""
    return -(gate * gate.clamp_min(1e-12).log()).sum(-1).mean()


def rank_budget(mask: Tensor) -> Tensor:
    """Mean of the rank mask, [T, ..., R]: the share of the rank that is spent."""
    return mask.mean()


def load_balance(usage: Tensor, active: Tensor | None = None) -> Tensor:
    """Usage's squared distance from uniform over the A active specialists.

    sum_{active e} (u_e - 1/A)^2 with u_e = mean_t g_te, averaged over routers where there are
    several.

    Args:
        usage: the gate's mean over tokens, [..., E]; inactive specialists weigh 0.
        active: [E] or [..., E] bool; None: all.
    """
    even = 1 / usage.shape[-1] if active is None else active / active.sum(-1, keepdim=True)
    return (usage - even).square().sum(-1).mean()


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


def orthogonality(
    layers: Iterable[LowRank], specialists: int, current: int, earlier: Sequence[int]
) -> Tensor:
    """O-LoRA's loss: sum over layers and earlier specialists i of the entries of |A_i A_t^T|.

    Wang et al. 2023 (arXiv 2310.14152), in the L1 form of their code. The gradient goes to the
    current specialist's A alone: the earlier ones are what it must stay away from.

    Args:
        layers: the adapted layers.
        specialists: E.
        current: t, the specialist of the domain in training.
        earlier: specialists of the domains before it.
    """
    total = torch.zeros(())
    for layer in layers:
        blocks = layer.A.view(specialists, -1, layer.A.shape[-1])  # [E, R, D_in]
        others = blocks[list(earlier)].detach().flatten(0, 1)
        total = total.to(others.device) + (others @ blocks[current].t()).abs().sum()
    return total
