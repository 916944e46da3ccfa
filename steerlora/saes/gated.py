"""Gated: whether a latent is active and how strongly are two affine functions of one product.

Shapes: T tokens, D model width, N latents, K latents of a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from steerlora.saes.base import SparseAutoencoder, TrainingErrors, full, squared_deviation
from steerlora.saes.sparse import SparseFeatures


class Gates(NamedTuple):
    """Latents whose gate is open, with both of their values."""

    gate: SparseFeatures
    """h + b_gate, [..., K]; 0 where fewer than K gates are open."""
    magnitude: SparseFeatures
    """ReLU(exp(r_mag) h + b_mag), [..., K]; the features."""


class Gated(SparseAutoencoder):
    """z = 1[h + b_gate > 0] ReLU(exp(r_mag) h + b_mag), h = (u - b_dec) W_enc; K is the busiest's.

    Rajamanoharan et al., "Improving dictionary learning with gated sparse autoencoders" (arXiv
    2404.16014). Trained on the fraction of variance unexplained by z, plus that by
    g = ReLU(h + b_gate) through a decoder without gradient, plus ``l1`` times the mean over tokens
    of sum_n g_n / rho, where rho is the root mean square norm of x less its mean: the units of x do
    not count. All three touch open gates only.

    Parameters are SAELens's: ``b_gate``, ``b_mag`` and ``r_mag``, [N] each, in place of ``b_enc``.
    Gates start open on ``initial_l0`` / N of the tokens (:meth:`initialize_thresholds`).

    Args:
        width, latents: D and N.
        l1: weight of the L1 penalty in training, from 0.
        initial_l0: open gates per token at the start of training.
        settings: of every SAE (:class:`SparseAutoencoder`).
    """

    architecture = "gated"
    in_input_units = ("b_gate", "b_mag", "b_dec")

    def __init__(
        self,
        width: int,
        latents: int,
        *,
        l1: float = 0.1,
        initial_l0: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(width, latents, **settings)
        self.l1, self.initial_l0 = l1, initial_l0
        del self.b_enc
        for name in ("b_gate", "b_mag", "r_mag"):
            self.register_parameter(name, nn.Parameter(torch.zeros(latents)))

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        return self.open_gates(x).magnitude

    def open_gates(self, x: Tensor) -> Gates:
        """Open gates of x [..., D], which is in the SAE's units; differentiable."""
        gate = self.positive_latents(x, None, bias=self.b_gate)
        flat, shape = gate.indices.flatten(), gate.indices.shape
        b_gate, b_mag, r_mag = (
            full(parameter).index_select(0, flat).view(shape)
            for parameter in (self.b_gate, self.b_mag, self.r_mag)
        )
        magnitude = torch.relu((gate.values - b_gate) * r_mag.exp() + b_mag) * (gate.values > 0)
        return Gates(gate, SparseFeatures(magnitude, gate.indices))

    @torch.no_grad()
    def initialize_thresholds(self, x: Tensor) -> None:
        self.b_gate.copy_(-self.exceeded_on(x, self.initial_l0 / self.latents))

    def training_errors(self, x: Tensor, dead: Tensor) -> TrainingErrors:
        gate, magnitude = self.open_gates(x)
        residual = x - self.b_dec - self.directions(magnitude, unit_rows=self.unit_norm)
        by_gate = x - self.b_dec.detach() - self.directions(gate, frozen=True)
        deviation = squared_deviation(x)
        rho = (deviation / len(x)).sqrt()
        penalty = by_gate.square().sum() / deviation + self.l1 * gate.values.sum() / rho / len(x)
        return TrainingErrors(residual, penalty, self.times_fired(magnitude))

    def untrained_like(self, seed: int) -> Self:
        """As for any SAE; gates and magnitudes are the same too, or half of all were active."""
        twin = super().untrained_like(seed)
        with torch.no_grad():
            for name in ("b_gate", "b_mag", "r_mag"):
                getattr(twin, name).copy_(getattr(self, name))
        return twin
