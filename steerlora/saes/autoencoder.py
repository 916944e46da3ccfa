"""Sparse autoencoder: exact TopK (or ReLU) features of a residual stream.

Shapes: ... any batch dimensions, D model width, N latents, K active latents per token.

    u = normalise(x)   z = ReLU(TopK((u - b_dec) W_enc + b_enc))   y = denormalise(z W_dec + b_dec)

after Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), with the names,
parameter shapes and normalisation of SAELens v6. Arithmetic is float32 whatever the type of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.saes.sparse import SparseFeatures, sparse_decode, sparse_encode

__all__ = ["ACTIVATIONS", "NORMALIZATIONS", "SparseAutoencoder", "SparseFeatures", "untrained_like"]

ACTIVATIONS = ("topk", "relu")
NORMALIZATIONS = ("none", "layer_norm")
_LAYER_NORM_EPSILON = 1e-5


class NormalizedInput(NamedTuple):
    """An input as the SAE reads it, and what undoes the normalisation (scalars when it is none)."""

    x: Tensor
    """[..., D]"""
    mean: Tensor
    """[..., 1]"""
    scale: Tensor
    """[..., 1]"""


class SparseAutoencoder(nn.Module):
    """A TopK or ReLU sparse autoencoder.

    Parameters are SAELens's: ``W_enc`` [D, N], ``b_enc`` [N], ``W_dec`` [N, D], ``b_dec`` [D].
    ``W_enc`` is kept with its transpose contiguous, since gradients and gathers go by latent.
    It starts as the transpose of ``W_dec``, whose rows start as random unit vectors.

    Args:
        width: D.
        latents: N.
        k: active latents per token, for ``topk``; None for ``relu``.
        activation: ``topk`` or ``relu``.
        normalize: ``none``, or ``layer_norm``: zero mean and unit (unbiased) deviation per token.
        apply_b_dec_to_input: subtract ``b_dec`` before encoding.
        seed: of the initial weights.

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        width: int,
        latents: int,
        *,
        k: int | None = None,
        activation: str = "topk",
        normalize: str = "none",
        apply_b_dec_to_input: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation '{activation}': choose from {', '.join(ACTIVATIONS)}")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize '{normalize}': choose from {', '.join(NORMALIZATIONS)}")
        if activation == "topk" and not (k and 1 <= k <= latents):
            raise ValueError(f"k is {k}: a topk SAE of {latents} latents needs 1 <= k <= {latents}")
        if activation == "relu" and k is not None:
            raise ValueError(f"k is {k}: a relu SAE has no k; use activation 'topk' or leave k out")
        # Numbers of their own: a sharded weight has no shape between its uses.
        self.width, self.latents, self.k = width, latents, k
        self.activation = activation
        self.normalize = normalize
        self.apply_b_dec_to_input = apply_b_dec_to_input
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(latents, width, generator=generator), dim=1)
        self.W_enc = nn.Parameter(directions.clone().t())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(width))

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, latents={self.latents}, k={self.k}, "
            f"activation={self.activation}, normalize={self.normalize}"
        )

    def normalized(self, x: Tensor) -> NormalizedInput:
        """x [..., D] of any floating type, in float32 and in the SAE's own units."""
        x = x.to(_at_least_float32(self.W_dec.dtype))
        if self.normalize == "none":
            return NormalizedInput(x, x.new_zeros(()), x.new_ones(()))
        mean = x.mean(-1, keepdim=True)
        # SAELens divides by the deviation plus epsilon and multiplies back by the deviation.
        scale = x.std(-1, keepdim=True)
        return NormalizedInput((x - mean) / (scale + _LAYER_NORM_EPSILON), mean, scale)

    def encode(self, x: Tensor) -> SparseFeatures:
        """Features of every token, differentiable in x and in the parameters.

        Args:
            x: [..., D], any floating type.

        Returns:
            [..., K] values and indices; K = k for ``topk``, for ``relu`` the largest number of
            active latents of any token.
        """
        return self.encode_normalized(self.normalized(x).x)

    def encode_normalized(
        self, x: Tensor, extra_latents: Tensor | None = None, extra_k: int = 0
    ) -> SparseFeatures:
        """``encode`` of an input in the SAE's units; extra latents as in ``sparse_encode``."""
        shift = self.b_dec if self.apply_b_dec_to_input else torch.zeros_like(self.b_dec)
        W_enc, b_enc, shift = _full(self.W_enc), _full(self.b_enc), _full(shift)
        with torch.autocast(x.device.type, enabled=False):
            values, indices = sparse_encode(
                x.reshape(-1, self.width), W_enc, b_enc, shift, self.k, extra_latents, extra_k
            )
        return SparseFeatures(values.view(*x.shape[:-1], -1), indices.view(*x.shape[:-1], -1))

    def decode(self, features: SparseFeatures) -> Tensor:
        """Reconstruction in the SAE's own units: before any layer norm is undone.

        Args:
            features: values and indices, [..., K].

        Returns:
            [..., D], float32.
        """
        return self.directions(features) + _full(self.b_dec)

    def directions(self, features: SparseFeatures, unit_rows: bool = False) -> Tensor:
        """Sum of the active decoder rows, [..., K] -> [..., D]: what decodes a residual (no b_dec).

        ``unit_rows`` is for training with unit-norm rows: see ``sparse_decode``.
        """
        W_dec = _full(self.W_dec)
        flat = SparseFeatures(*(part.reshape(-1, part.shape[-1]) for part in features))
        with torch.autocast(W_dec.device.type, enabled=False):
            return sparse_decode(flat, W_dec, unit_rows).view(*features.values.shape[:-1], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x in x's own units: [..., D] -> [..., D], float32."""
        inputs = self.normalized(x)
        return self.decode(self.encode_normalized(inputs.x)) * inputs.scale + inputs.mean

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring every row of ``W_dec`` back to unit length."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def center_on(self, x: Tensor, iterations: int = 20) -> None:
        """Set ``b_dec`` to the geometric median of x [T, D], by Weiszfeld's algorithm."""
        points = self.normalized(x).x
        median = points.mean(0)
        for _ in range(iterations):
            weights = 1 / (points - median).norm(dim=1).clamp_min(1e-8)
            median = weights @ points / weights.sum()
        self.b_dec.copy_(median)


def untrained_like(sae: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """A randomly initialised SAE with the shape, settings, device and type of ``sae``.

    Its ``b_dec`` is that of ``sae``, so that the directions alone are random: the control
    ``replace_random_sae``.
    """
    twin = SparseAutoencoder(
        sae.width,
        sae.latents,
        k=sae.k,
        activation=sae.activation,
        normalize=sae.normalize,
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        seed=seed,
    ).to(sae.W_dec)
    with torch.no_grad():
        twin.b_dec.copy_(sae.b_dec)
    return twin.requires_grad_(sae.W_dec.requires_grad)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _full(parameter: Tensor) -> Tensor:
    return parameter.to(_at_least_float32(parameter.dtype))
