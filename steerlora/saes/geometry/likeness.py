"""How like an SAE's dictionary is to another's, and how like chance alone would make them.

Shapes: T tokens, D width, N and M latents of two SAEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.geometry.directions import (
    alignment,
    linear_cka,
    matched_directions,
    principal_angles,
    random_directions,
    subspace,
)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Of two dictionaries."""

    alignment: float
    """Mean over the first one's live directions of the largest cosine with any of the second's."""
    angles: dict[int, float]
    """{K: mean principal angle, in degrees, of the subspaces in which each is longest}."""
    cka: float
    """Centred linear CKA of their features on the same tokens; 0 where nothing varies."""


class Seen(NamedTuple):
    """A dictionary, and what it makes of some tokens."""

    rows: Tensor
    """Directions of the latents that are active on any of them, [N, D]."""
    features: Tensor
    """[T, N]."""
    alive: float
    """Their share of all latents."""


@torch.no_grad()
def seen(sae: SparseAutoencoder, x: Tensor) -> Seen:
    """An SAE on activations [T, D]; where no latent is active, all count."""
    features = sae.encode(x).dense(sae.latents)
    alive = (features > 0).any(0)
    kept = alive if bool(alive.any()) else torch.ones_like(alive)
    return Seen(sae.W_dec.detach()[kept], features[:, kept], float(alive.float().mean()))


def likeness(first: Seen, second: Seen, sizes: Sequence[int]) -> Likeness:
    """Of two SAEs on the same tokens, each on its own activations of them.

    Args:
        first: whose directions are looked for in the other.
        second: the other.
        sizes: K, dimensions of subspaces; those that either has not are left out.
    """
    return Likeness(
        alignment=float(alignment(first.rows, second.rows).mean()),
        angles=_angles(first.rows, second.rows, sizes),
        cka=_cka(first.features, second.features),
    )


def chance(
    first: Seen,
    second: Seen,
    sizes: Sequence[int],
    generator: torch.Generator,
    matched: Tensor | None = None,
) -> Likeness:
    """What is left of a likeness where the first dictionary knows nothing.

    Its directions are random, and its features go with other tokens.

    Args:
        first, second, sizes: as for :func:`likeness`.
        generator: of what is drawn.
        matched: activations [T', D] whose covariance the directions have; None: isotropic.
    """
    count, width = first.rows.shape
    drawn = (
        random_directions(count, width, generator)
        if matched is None
        else matched_directions(count, matched, generator)
    )
    order = torch.randperm(len(first.features), generator=generator)
    return Likeness(
        alignment=float(alignment(drawn, second.rows).mean()),
        angles=_angles(drawn, second.rows, sizes),
        cka=_cka(first.features[order], second.features),
    )


def _angles(first: Tensor, second: Tensor, sizes: Sequence[int]) -> dict[int, float]:
    most = min(*first.shape, *second.shape)
    return {
        k: float(principal_angles(subspace(first, k), subspace(second, k)).mean())
        for k in sizes
        if k <= most
    }


def _cka(first: Tensor, second: Tensor) -> float:
    found = linear_cka(first, second)
    return found if found == found else 0.0
