"""TopK: the k largest pre-activations of every token.

Shapes: T tokens, D model width, N latents, K active latents per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder, TrainingErrors, squared_deviation
from steerlora.saes.sparse import SparseFeatures


class TopK(SparseAutoencoder):
    """z = ReLU(TopK((u - b_dec) W_enc + b_enc)), [..., D] -> [..., K], with K = k.

    Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093). Trained on the
    fraction of variance unexplained plus ``auxiliary`` times AuxK (their A.2): the fraction of the
    residual unexplained by the best D / 2 dead latents, scaled down while fewer are dead. It
    decodes a residual, so without ``b_dec``.

    Args:
        width, latents: D and N.
        k: active latents per token, from 1 to N.
        auxiliary: weight of AuxK in training; 0 turns it off.
        initial_k: k at the start of training, from where it goes to ``k`` linearly; None: k.
        anneal_fraction: share of the training in which it does.
        settings: of every SAE (:class:`SparseAutoencoder`).

    Raises:
        ValueError: k out of range.
    """

    architecture = "topk"
    own_settings = ("k",)

    def __init__(
        self,
        width: int,
        latents: int,
        *,
        k: int,
        auxiliary: float = 1 / 32,
        initial_k: int | None = None,
        anneal_fraction: float = 0.1,
        **settings: Any,
    ) -> None:
        super().__init__(width, latents, **settings)
        for name, value in {"k": k, "initial_k": k if initial_k is None else initial_k}.items():
            if not 1 <= value <= latents:
                raise ValueError(
                    f"{name} is {value}: a {self.architecture} SAE of {latents} latents needs "
                    f"1 <= {name} <= {latents}"
                )
        self.k = self.mean_k = k
        self.auxiliary = auxiliary
        self.initial_k, self.anneal_fraction = initial_k, anneal_fraction
        self.training_k = k if initial_k is None else initial_k

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        return self.positive_latents(x, self.k)

    def continue_from(self, saved: SparseAutoencoder) -> None:
        super().continue_from(saved)
        self.initial_k, self.training_k = None, self.mean_k  # there is nothing left to anneal

    def begin_step(self, progress: float) -> None:
        if self.initial_k is not None:
            behind = min(1.0, progress / self.anneal_fraction)
            self.training_k = round(self.initial_k + (self.mean_k - self.initial_k) * behind)

    def training_latents(self, x: Tensor, dead: Tensor | None, aux_k: int) -> SparseFeatures:
        """Features of a batch in training, [T, K + aux_k]: the last are the best dead latents."""
        return self.positive_latents(x, self.training_k, dead, aux_k)

    def residual(self, x: Tensor, features: SparseFeatures) -> tuple[Tensor, Tensor]:
        """What the features leave of x, [T, D], and what else is minimised of them."""
        residual = x - self.b_dec - self.directions(features, unit_rows=self.unit_norm)
        return residual, x.new_zeros(())

    def training_errors(self, x: Tensor, dead: Tensor) -> TrainingErrors:
        half = self.width // 2
        # With AuxK off, the search for the dead latents is spared: an accelerator waits for it.
        dead = dead.nonzero()[:, 0] if self.auxiliary else x.new_zeros(0, dtype=torch.long)
        aux_k = min(half, len(dead))
        values, indices = self.training_latents(x, dead if aux_k else None, aux_k)
        k = values.shape[1] - aux_k
        main = SparseFeatures(values[:, :k], indices[:, :k])
        residual, penalty = self.residual(x, main)
        if aux_k:
            target = residual.detach()
            aux = SparseFeatures(values[:, k:], indices[:, k:])
            error = (target - self.directions(aux, unit_rows=self.unit_norm)).square().sum()
            scale = min(1.0, len(dead) / half)
            penalty = penalty + self.auxiliary * scale * error / squared_deviation(target)
        return TrainingErrors(residual, penalty, self.times_fired(main))

    def training_flops_per_token(self) -> float:
        """The encoder's product, and k rows of a table four times over.

        These are the reconstruction, the gradient of the active values, and the gradients of both
        weight matrices, which touch active latents only (``saes/sparse.py``). AuxK is not counted:
        there are no dead latents in a good training.
        """
        return 2 * self.width * self.latents + 4 * 2 * self.mean_k * self.width

    def saelens_keys(self) -> dict[str, Any]:
        return super().saelens_keys() | {"rescale_acts_by_decoder_norm": False}
