"""JumpReLU: every latent has a threshold of its own, which is learnt.

Shapes: T tokens, D model width, N latents, K latents of a token.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steerlora.errors import nearest
from steerlora.saes.base import SparseAutoencoder, TrainingErrors, full, squared_deviation
from steerlora.saes.config import JUMP_PENALTIES
from steerlora.saes.sparse import SparseFeatures

_STEEPNESS = 4.0
"""Of the tanh penalty, per standard deviation of a coordinate of x."""


class JumpReLU(SparseAutoencoder):
    """z = s 1[s > theta], s = (u - b_dec) W_enc + b_enc, theta [N] >= 0; K is the busiest token's.

    Rajamanoharan et al., "Jumping ahead" (arXiv 2407.14435). Trained on the fraction of variance
    unexplained plus ``sparsity`` times the mean over tokens of a penalty P(z):

    - ``l0``: the number of active latents;
    - ``tanh``: sum_n tanh(4 z_n / sigma), a bounded measure of their size, sigma being the standard
      deviation of a coordinate of x.

    A step has no useful gradient, so theta has the paper's straight-through ones, of a rectangle of
    width epsilon = ``bandwidth`` sigma about the threshold: -theta / epsilon of z, and -1 / epsilon
    of the step. So a step of training touches the latents within half of epsilon below their
    thresholds, and those above. Thresholds start where each latent is active on ``initial_l0`` / N
    of the tokens (:meth:`initialize_thresholds`), so that there are few of these from the first
    step on.

    Args:
        width, latents: D and N.
        sparsity: weight of the penalty, from 0.
        penalty: ``l0`` or ``tanh``.
        bandwidth: width of the rectangle, in standard deviations of a coordinate of x.
        initial_l0: active latents per token at the start of training.
        settings: of every SAE (:class:`SparseAutoencoder`).

    Raises:
        ValueError: an unknown penalty.
    """

    architecture = "jumprelu"
    in_input_units = ("b_enc", "b_dec", "threshold")

    def __init__(
        self,
        width: int,
        latents: int,
        *,
        sparsity: float = 1e-3,
        penalty: str = "l0",
        bandwidth: float = 0.5,
        initial_l0: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(width, latents, **settings)
        if penalty not in JUMP_PENALTIES:
            raise ValueError(f"penalty '{penalty}': {nearest(penalty, JUMP_PENALTIES)}")
        self.sparsity, self.penalty = sparsity, penalty
        self.bandwidth, self.initial_l0 = bandwidth, initial_l0
        self.threshold = nn.Parameter(torch.zeros(latents))

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        return latents_above(self, x, self.threshold)

    @torch.no_grad()
    def initialize_thresholds(self, x: Tensor) -> None:
        share = self.initial_l0 / self.latents
        self.threshold.copy_((self.exceeded_on(x, share) + full(self.b_enc)).clamp_min(0))

    def training_errors(self, x: Tensor, dead: Tensor) -> TrainingErrors:
        sigma = (squared_deviation(x) / x.numel()).sqrt()
        epsilon = self.bandwidth * sigma
        floor = full(self.threshold).detach() - epsilon / 2
        near, indices = self.positive_latents(x, None, bias=full(self.b_enc) - floor)
        flat, chosen = indices.flatten(), near > 0
        # The floor is a constant: what it takes from the bias it gives back.
        scores = near + floor[indices]
        threshold = full(self.threshold).index_select(0, flat).view_as(scores)
        values, active = _Jump.apply(scores, threshold, epsilon)
        values, active = values * chosen, active * chosen
        features = SparseFeatures(values, indices)
        residual = x - self.b_dec - self.directions(features, unit_rows=self.unit_norm)
        if self.penalty == "l0":
            penalty = active.sum()
        else:
            penalty = (_STEEPNESS * values / sigma).tanh().sum()
        penalty = self.sparsity * penalty / len(x)
        return TrainingErrors(residual, penalty, self.times_fired(features))

    def untrained_like(self, seed: int) -> Self:
        """As for any SAE; biases and thresholds are the same too, or half of all were active."""
        twin = super().untrained_like(seed)
        with torch.no_grad():
            twin.b_enc.copy_(self.b_enc)
            twin.threshold.copy_(self.threshold)
        return twin


def latents_above(sae: SparseAutoencoder, x: Tensor, threshold: Tensor) -> SparseFeatures:
    """s 1[s > threshold] of an SAE's pre-activations s, differentiable but for the threshold.

    Args:
        sae: whose encoder.
        x: [..., D], in the SAE's units.
        threshold: [N]; below 0 it counts as 0.

    Returns:
        [..., K], K being the busiest token's.
    """
    threshold = full(threshold).detach().clamp_min(0)
    values, indices = sae.positive_latents(x, None, bias=full(sae.b_enc) - threshold)
    return SparseFeatures(torch.where(values > 0, values + threshold[indices], 0), indices)


class _Jump(torch.autograd.Function):
    """(s 1[s > theta], 1[s > theta]) with the straight-through gradients of theta."""

    @staticmethod
    def forward(ctx, scores, threshold, epsilon):
        active = (scores > threshold) & (scores > 0)
        ctx.save_for_backward(scores, threshold, epsilon, active)
        return scores * active, active.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, grad_active):
        scores, threshold, epsilon, active = ctx.saved_tensors
        near = (scores - threshold).abs() < epsilon / 2
        grad_threshold = -(threshold.clamp_min(0) * grad_values + grad_active) * near / epsilon
        return grad_values * active, grad_threshold, None
