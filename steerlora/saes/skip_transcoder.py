"""Skip-transcoder: sparse features of one stream, and a linear map, write a later one.

Shapes: T tokens, D model width, N latents, K active latents per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.topk import TopK


class SkipTranscoder(TopK):
    """y = z W_dec + b_dec + u W_skip^T, z = ReLU(TopK(u W_enc + b_enc)): y is not u again.

    Paulo et al., "Transcoders beat sparse autoencoders for interpretability" (arXiv 2501.18823).
    u is the stream entering layer c, y approximates the one that enters layer c + ``span``, which
    training reads beside it. Trained as TopK is, on the fraction of that stream's variance
    unexplained, with the same auxiliary loss. ``W_skip`` [D, D] starts at 0. Both streams come and
    go in their own units, and ``b_dec`` is in those of y, so it is not subtracted from u.

    As a control signal z is that of site c, like any SAE's: it is a function of the stream there
    alone, so it routes, is compared with the base and is intervened on in the same way. It can be
    no signal of site c + ``span``, whose stream it does not read. And where an SAE's reconstruction
    replaces the stream at its own site, this one's cannot: it belongs ``span`` layers later.

    Args:
        width, latents: D and N.
        span: layers between the two streams, from 1.
        settings: of TopK (:class:`TopK`); without input normalisation.

    Raises:
        ValueError: a normalisation, ``b_dec`` subtracted from the input, or no span.
    """

    architecture = "skip_transcoder"
    own_settings = ("k", "span")

    def __init__(
        self,
        width: int,
        latents: int,
        *,
        span: int = 1,
        normalize: str = "none",
        apply_b_dec_to_input: bool = False,
        **settings: Any,
    ) -> None:
        if span < 1 or normalize != "none" or apply_b_dec_to_input:
            raise ValueError(
                f"span={span}, normalize={normalize}, apply_b_dec_to_input={apply_b_dec_to_input}: "
                "a skip-transcoder writes a later stream in its own units: it needs a span from 1, "
                "none and False"
            )
        super().__init__(width, latents, apply_b_dec_to_input=False, **settings)
        self.span = span
        self.W_skip = nn.Parameter(torch.zeros(width, width))

    def read(self, streams: Tensor) -> Tensor:
        return streams[..., 0, :]

    def written(self, streams: Tensor) -> Tensor:
        return streams[..., 1, :]

    def output(self, x: Tensor, features: SparseFeatures) -> Tensor:
        return self.decode(features) + self._skipped(x)

    def training_latents(self, x: Tensor, dead: Tensor | None, aux_k: int) -> SparseFeatures:
        return super().training_latents(self.read(x), dead, aux_k)

    def residual(self, x: Tensor, features: SparseFeatures) -> tuple[Tensor, Tensor]:
        residual, penalty = super().residual(self.written(x), features)
        return residual - self._skipped(self.read(x)), penalty

    def _skipped(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return x @ self.W_skip.to(x.dtype).t()

    def training_flops_per_token(self) -> float:
        """TopK's, and the skip's product and its weight's gradient."""
        return super().training_flops_per_token() + 2 * 2 * self.width**2
