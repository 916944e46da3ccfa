"""ReLU with an L1 penalty: the first sparse autoencoders of language models, and the paper's.

Shapes: T tokens, D model width, N latents, K active latents per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder, TrainingErrors
from steerlora.saes.sparse import SparseFeatures


class ReLU(SparseAutoencoder):
    """z = ReLU((u - b_dec) W_enc + b_enc), [..., D] -> [..., K]: K is that of the busiest token.

    Cunningham et al., "Sparse autoencoders find highly interpretable features" (arXiv 2309.08600);
    unit-norm decoder rows after Bricken et al., "Towards monosemanticity" (2023). Trained on the
    fraction of variance unexplained plus ``l1`` times the mean over tokens of sum_n z_n.

    Args:
        width, latents: D and N.
        l1: weight of the L1 penalty in training, from 0.
        settings: of every SAE (:class:`SparseAutoencoder`).
    """

    architecture = "relu"

    def __init__(self, width: int, latents: int, *, l1: float = 1e-3, **settings: Any) -> None:
        super().__init__(width, latents, **settings)
        self.l1 = l1

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        return self.positive_latents(x, None)

    def training_errors(self, x: Tensor, dead: Tensor) -> TrainingErrors:
        """Dense: early in training about half of all latents are active."""
        shift = self.b_dec if self.apply_b_dec_to_input else 0
        with torch.autocast(x.device.type, enabled=False):
            latents = torch.relu((self.encoder_input(x) - shift) @ self.W_enc + self.b_enc)
            rows = F.normalize(self.W_dec, dim=1) if self.unit_norm else self.W_dec
            residual = x - self.b_dec - latents @ rows
        penalty = self.l1 * latents.sum() / len(x)
        return TrainingErrors(residual, penalty, (latents > 0).sum(0).to(x.dtype))

    def training_flops_per_token(self) -> float:
        """Two dense products forward; backward both weights', the latents', and ``b_dec``'s where
        it is subtracted from the input."""
        return 2 * self.width * self.latents * (5 + self.apply_b_dec_to_input)
