"""BatchTopK: k latents per token on average, the largest of the whole batch.

Shapes: T tokens, D model width, N latents, K active latents of the busiest token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerlora.distributed.reductions import least_over_ranks, sum_over_ranks
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.jumprelu import JumpReLU, latents_above
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.topk import TopK

_THRESHOLD_RATE = 0.05
"""By how much a step of training moves the threshold to its own batch's."""


class BatchTopK(TopK):
    """z = s 1[s > theta], s = (u - b_dec) W_enc + b_enc, with one theta >= 0 for all latents.

    Bussmann et al., "BatchTopK sparse autoencoders" (arXiv 2412.06410). In training the T k largest
    positive s of the T tokens of a batch are kept, exactly, and theta follows the smallest of them:
    it is its running average over steps, and so does in inference, token by token, what the
    selection did in training. Until a step has been taken it is 0. Ranks that share a batch
    select among all of its tokens.

    What is saved is the JumpReLU SAE with all thresholds theta (:meth:`for_inference`), as in
    SAELens.

    Args:
        width, latents: D and N.
        k: active latents per token on average, from 1 to N.
        settings: of TopK (:class:`TopK`), with the same auxiliary loss.
    """

    architecture = "batch_topk"
    in_input_units = ("b_enc", "b_dec", "threshold")

    def __init__(self, width: int, latents: int, *, k: int, **settings: Any) -> None:
        super().__init__(width, latents, k=k, **settings)
        self.k = None  # of no single token
        self.register_buffer("threshold", torch.zeros(()))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"k": self.mean_k}

    def encode_normalized(self, x: Tensor) -> SparseFeatures:
        return latents_above(self, x, self.threshold.expand(self.latents))

    def training_latents(self, x: Tensor, dead: Tensor | None, aux_k: int) -> SparseFeatures:
        (tokens,) = sum_over_ranks([x.new_tensor(float(len(x)))])
        budget = self.training_k * int(tokens)
        features = self.positive_latents(x, None, dead, aux_k, budget=budget)
        values = features.values.detach()
        self._follow(values[:, : values.shape[1] - aux_k])
        return features

    @torch.no_grad()
    def _follow(self, kept: Tensor) -> None:
        """Move theta towards the smallest positive of a batch's values [T, K], if there is one."""
        lowest = least_over_ranks(torch.where(kept > 0, kept, torch.inf).amin())
        rate = torch.where(self.threshold > 0, _THRESHOLD_RATE, 1.0)
        moved = self.threshold + rate * (lowest - self.threshold)
        self.threshold.copy_(torch.where(lowest.isfinite(), moved, self.threshold))

    def continue_from(self, saved: SparseAutoencoder) -> None:
        state = saved.state_dict()
        self.load_state_dict(state | {"threshold": state["threshold"].amax()})
        self.initial_k, self.training_k = None, self.mean_k

    def for_inference(self) -> SparseAutoencoder:
        thresholds = {"threshold": self.threshold.expand(self.latents)}
        return self.converted(JumpReLU, self.state_dict() | thresholds)
