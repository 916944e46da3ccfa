from dataclasses import dataclass

import torch
from torch import nn

from steerlora.saes.base import SparseAutoencoder, TrainingErrors
from steerlora.saes.config import SAEConfig, sae
from steerlora.saes.sparse import SparseFeatures, top_k


@sae("threshold")
@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(SAEConfig):
    """Latents above a threshold, each with a gain of its own."""

    architecture: str = "threshold"
    threshold: float = 0.1
    """Pre-activation from which a latent is active."""
    sparsity: float = 1e-3
    """Weight of the L1 norm in training."""

    @classmethod
    def module(cls):
        return Threshold


class Threshold(SparseAutoencoder):
    """z = exp(gain) s 1[s > threshold], with s = (u - b_dec) W_enc + b_enc and a gain [N]."""

    architecture = "threshold"
    own_settings = ("threshold",)  # what a saved one must say of itself

    def __init__(self, width, latents, *, threshold, sparsity=0.0, **settings):
        super().__init__(width, latents, **settings)
        self.threshold, self.sparsity = threshold, sparsity
        self.gain = nn.Parameter(torch.zeros(latents))

    def encode_normalized(self, x):  # [..., D] -> values and indices, [..., K]
        scores = (x.reshape(-1, self.width) - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = top_k(scores, max(1, int((scores > self.threshold).sum(1).max())))
        values = values * (values > self.threshold) * self.gain[indices].exp()
        shape = (*x.shape[:-1], values.shape[1])
        return SparseFeatures(values.view(shape), indices.view(shape))

    def training_errors(self, x, dead):  # [T, D] -> residual [T, D], penalty, times fired [N]
        features = self.encode_normalized(x)
        residual = x - self.b_dec - self.directions(features, unit_rows=self.unit_norm)
        penalty = self.sparsity * features.values.sum() / len(x)
        return TrainingErrors(residual, penalty, self.times_fired(features))
