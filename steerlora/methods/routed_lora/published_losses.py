"""The auxiliary losses whose published form differs from ours (``losses.py``).

T real tokens, E specialists, A of them active. ``...`` is nothing, or the adapted modules where
each has a router of its own. ``method.published_losses`` chooses them; `docs/published.md` says
which parts of each formula the publication leaves open.

Preservation, steering and the rank budget have one formula in both. What differs is where the first
two compare features: as published at every site, summed (``compared_sites.py``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.methods.lowrank import LowRank

LEAST_ENTROPY = 0.2
"""Share of log A below which the entropy of a token's gate is penalised."""
LARGEST_PEAK = 0.9
"""Gate of a single specialist above which it is penalised."""


def gate_sparsity(gate: Tensor, active: Tensor) -> Tensor:
    """mean_t max(0, 0.2 log A - H(g_t)) + mean_t max(0, max_e g_te - 0.9).

    Despite its name it keeps gates from becoming one-hot: ours, the entropy, makes them so.

    Args:
        gate: [T, ..., E].
        active: [E] or [..., E] bool.
    """
    entropy = -(gate * gate.clamp_min(1e-12).log()).sum(-1)
    least = LEAST_ENTROPY * active.sum(-1).to(gate.dtype).log()
    return F.relu(least - entropy).mean() + F.relu(gate.amax(-1) - LARGEST_PEAK).mean()


def load_balance(usage: Tensor, active: Tensor) -> Tensor:
    """mean_{active e} (u_e - 1/A)^2; ours is the sum.

    Args:
        usage: u, the gate's mean over tokens, [..., E]; inactive specialists weigh 0.
        active: [E] or [..., E] bool.
    """
    count = active.sum(-1, keepdim=True)
    return ((usage - active / count).square().sum(-1) / count.squeeze(-1)).mean()


def specialist_diversity(layers: Iterable[tuple[LowRank, Tensor]], specialists: int) -> Tensor:
    """Mean over layers, and over A and B, of the mean entry of G * G.

    G is the A x A Gram matrix of the active specialists' blocks, flat and at unit length. Its
    diagonal counts, a constant. Inactive specialists get no gradient.

    Args:
        layers: each adapted layer, and which specialists are active in it, [E] bool.
        specialists: E.
    """
    values = []
    for layer, active in layers:
        for stack in (layer.A, layer.B.t()):
            blocks = stack.reshape(specialists, -1)[active.to(stack.device)]
            # Squared norms are clamped before any root is taken: B is zero at first.
            gram = blocks @ blocks.t()
            norms = gram.diagonal().clamp_min(1e-12)
            values.append((gram.square() / torch.outer(norms, norms)).mean())
    return torch.stack([value.to(values[0].device) for value in values]).mean()
