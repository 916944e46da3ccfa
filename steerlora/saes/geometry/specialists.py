"""Specialists of one adapter: whether their deltas share a dictionary, and lie along what routes.

Shapes: T tokens, D width, N latents, E specialists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.geometry.directions import alignment, matched_directions
from steerlora.saes.geometry.likeness import seen
from steerlora.saes.geometry.reconstruction import unexplained
from steerlora.saes.geometry.records import Specialists

ROUTING = 8
"""Latents that route to a specialist: those that go along with its gate most."""


class Signal(NamedTuple):
    """What routes specialists, on some tokens."""

    gates: Tensor
    """[T, E]."""
    features: Tensor
    """[T, N]."""
    directions: Tensor
    """Decoder rows of the latents, [N, D]."""


def routing_latents(gates: Tensor, features: Tensor, count: int = ROUTING) -> Tensor:
    """The latents whose features correlate most with each specialist's gate over tokens, [E, M].

    Args:
        gates: [T, E].
        features: [T, N].
        count: M.
    """
    gate, feature = (part - part.mean(0) for part in (gates.double(), features.double()))
    norms = gate.norm(dim=0)[:, None] * feature.norm(dim=0)
    correlation = gate.t() @ feature / norms.clamp_min(1e-30)
    return correlation.topk(min(count, features.shape[1]), dim=1).indices


def share_within(x: Tensor, directions: Tensor) -> float:
    """Share of the squared length of rows [T, D] that lies in the span of directions [M, D]."""
    basis = torch.linalg.svd(directions, full_matrices=False).Vh
    return float((x @ basis.t()).square().sum() / x.square().sum().clamp_min(1e-30))


@torch.no_grad()
def specialists_of(
    fit: Sequence[Tensor],
    held_out: Sequence[Tensor],
    saes: Sequence[Sequence[SparseAutoencoder]],
    signal: Signal | None,
    *,
    method: str,
    seed: int,
    layer: int,
    generator: torch.Generator,
) -> Specialists:
    """How specialists' deltas at a layer lie to each other, and to what routes to them.

    Args:
        fit, held_out: deltas of each specialist, [T, D].
        saes: two of each, trained on ``fit``.
        signal: what routes; None where no features do.
        method, seed, layer: of the record.
        generator: of what is drawn.
    """
    read = [[seen(sae, x) for sae in own] for own, x in zip(saes, held_out, strict=True)]
    drawn = [
        matched_directions(len(own[0].rows), x, generator) for own, x in zip(read, fit, strict=True)
    ]
    number = range(len(fit))

    def other(row: int, column: int) -> Tensor:
        """The dictionary that row's is compared with: of its own deltas, the second SAE's."""
        return read[column][1 if row == column else 0].rows

    routed, chance = [], []
    if signal is not None:
        gates, features, directions = signal
        chosen = routing_latents(gates, features)
        alive = (features > 0).any(0).nonzero().flatten()
        random = [
            alive[torch.randperm(len(alive), generator=generator)[: chosen.shape[1]]]
            for _ in number
        ]
        routed, chance = (
            [[share_within(held_out[e], directions[latents[o]]) for o in number] for e in number]
            for latents in (chosen, random)
        )
    return Specialists(
        method=method,
        seed=seed,
        layer=layer,
        shared=[
            [float(alignment(read[e][0].rows, other(e, o)).mean()) for o in number] for e in number
        ],
        chance=[[float(alignment(drawn[e], other(e, o)).mean()) for o in number] for e in number],
        crossed=[
            [unexplained(held_out[o], saes[e][0](held_out[o])) for o in number] for e in number
        ],
        routed=routed,
        routed_random=chance,
    )
