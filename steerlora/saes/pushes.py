"""Changing single latents in the code of an SAE, and what that adds to the stream.

Shapes: ... any batch dimensions, D model width, N latents, K active latents per token, J latents
that are changed.
"""

from __future__ import annotations

from torch import Tensor

from steerlora.saes.base import SparseAutoencoder, full

HOW = ("set", "add")


def push(
    sae: SparseAutoencoder, x: Tensor, latents: Tensor, strengths: Tensor, how: str = "set"
) -> Tensor:
    """What to add to a stream so that its code changes in these latents alone.

    The decoded difference of the two codes, (z' - z) W_dec: what the SAE does not reconstruct of
    the stream stays in it as it is.

    Args:
        sae: that reconstructs what it reads.
        x: [..., D], any floating type.
        latents: [J] numbers in [0, N).
        strengths: [J] or [..., J], in the SAE's own units (``normalized``); differentiable.
        how: "set", z'_j is the strength; "add", z'_j = max(0, z_j + strength).

    Returns:
        [..., D], at least float32.
    """
    inputs = sae.normalized(x)
    values, indices = sae.encode_normalized(inputs.x)
    here = indices[..., None] == latents  # [..., K, J]
    z = (values[..., None] * here).sum(-2)
    changed = strengths.to(z) if how == "set" else (z + strengths.to(z)).relu()
    return (changed - z) @ full(sae.W_dec)[latents] * inputs.scale
