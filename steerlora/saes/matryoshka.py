"""Matryoshka SAEs: the first N / 2, N / 4, ... latents each reconstruct by themselves.

Shapes: T tokens, D model width, N latents, K active latents per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steerlora.saes.base import SparseAutoencoder, squared_deviation
from steerlora.saes.batch_topk import BatchTopK
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.topk import TopK


class Matryoshka(TopK):
    """What is nested, whatever selects the active latents.

    Bussmann et al., "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv
    2503.17547). The active latents are selected among all N. Beside the fraction of variance
    unexplained by all of them, training minimises those by the active ones among the first N / 2,
    N / 4, ... latents, ``levels`` reconstructions in all. Every active latent is decoded once: a
    level adds its own to what the one before it has reconstructed.

    Args:
        width, latents: D and N.
        levels: reconstructions, from 1; the smallest has N / 2^(levels - 1) latents.
        settings: of TopK (:class:`TopK`), with the same auxiliary loss.

    Raises:
        ValueError: more levels than halvings of N.
    """

    own_settings = ("k", "levels")

    def __init__(self, width: int, latents: int, *, levels: int = 4, **settings: Any) -> None:
        super().__init__(width, latents, **settings)
        if levels < 1 or not latents >> (levels - 1):
            raise ValueError(f"levels is {levels}: {latents} latents have no such prefixes")
        self.levels = levels
        self.prefixes = [latents >> level for level in reversed(range(levels))]

    def residual(self, x: Tensor, features: SparseFeatures) -> tuple[Tensor, Tensor]:
        residual, nested, first = x - self.b_dec, x.new_zeros(()), 0
        for last in self.prefixes:
            values, indices = features
            level = features.among((values > 0) & (indices >= first) & (indices < last))
            residual = residual - self.directions(level, unit_rows=self.unit_norm)
            if last < self.latents:
                nested = nested + residual.square().sum()
            first = last
        return residual, nested / squared_deviation(x)


class MatryoshkaTopK(Matryoshka):
    """Matryoshka over TopK; what is saved is the TopK SAE with its weights."""

    architecture = "matryoshka_topk"

    def for_inference(self) -> SparseAutoencoder:
        return self.converted(TopK, self.state_dict(), k=self.k)


class MatryoshkaBatchTopK(Matryoshka, BatchTopK):
    """Matryoshka over BatchTopK; what is saved is BatchTopK's."""

    architecture = "matryoshka_batch_topk"
