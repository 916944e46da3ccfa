"""A stream that is pushed in the code of its SAE, or along a vector.

B batch, S sequence, T tokens, D model width, J latents.

On every token that carries a signal,

    x -> x + (z' - z) W_dec,   z'_j = s_j (or max(0, z_j + s_j)), all other latents as they are
    x -> x + s v

The first is "supervised steering" (arXiv 2605.31183) with its per-feature strengths; the second is
what difference of means, probes, principal components and ReFT-r1 (arXiv 2501.17148) do with their
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerlora.lm.decoder import decoder_of
from steerlora.methods.base import Method
from steerlora.methods.sae_steering.config import SAESteeringConfig
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.pushes import push


class Steering(Method):
    """Strengths of latents, or a vector.

    Parameter names: ``strengths`` [J] of latents; ``vector`` [D], zero at first.

    Attributes:
        factors: [B], by which the strengths are multiplied in each row of the forwards that follow,
            so that several strengths are tried in one batch; None: by 1.

    Raises:
        ValueError: as a `Method`; a latent that the SAE lacks; an SAE that writes another stream
            than it reads.
    """

    def __init__(
        self,
        config: SAESteeringConfig,
        model: nn.Module,
        saes: Mapping[int, SparseAutoencoder] | None = None,
    ) -> None:
        super().__init__(config, model, saes)
        self.factors: Tensor | None = None
        (self.site,) = config.sites
        if not config.reads_features:
            self.vector = nn.Parameter(torch.zeros(decoder_of(model).config.hidden_size))
            return
        sae = self.saes[self.site]
        if sae.span:
            raise ValueError(
                f"the SAE at site {self.site} writes the stream {sae.span} layers above the one "
                "that it reads: give one that reconstructs what it reads"
            )
        lacking = [latent for latent in config.latents if latent >= sae.latents]
        if lacking:
            raise ValueError(
                f"the SAE at site {self.site} lacks latent {lacking[0]}: it has latents 0 to "
                f"{sae.latents - 1}"
            )
        self.register_buffer("latents", torch.tensor(config.latents), persistent=False)
        self.strengths = nn.Parameter(torch.tensor(config.strengths, dtype=torch.float32))

    def targets(self, model: nn.Module) -> dict:
        return {}

    def edits(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {self.site: self._steered}

    def _steered(self, stream: Tensor) -> Tensor:
        where = self.forward_state.signal_tokens(stream, self.signal_tokens)
        if not where.any():
            return stream
        row, place = where.nonzero(as_tuple=True)
        factor = stream.new_ones(1) if self.factors is None else self.factors.to(stream)[row]
        added = self._added(stream[row, place], factor[:, None]).to(stream)
        return stream.index_put((row, place), added, accumulate=True)

    def _added(self, x: Tensor, factor: Tensor) -> Tensor:
        """What is added to tokens, [T, D] and [T or 1, 1] -> [T, D]."""
        if not self.config.reads_features:
            return (factor * self.config.strengths[0] * self.vector.to(x)).expand_as(x)
        sae = self.saes[self.site]
        x, factor, strengths, latents = (
            own.to(sae.W_dec.device) for own in (x, factor, self.strengths, self.latents)
        )
        return push(sae, x, latents, factor * strengths, self.config.how)

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, *lists)
        errors = lists[-1]
        errors += [f"{n} is not finite" for n, held in state.items() if not held.isfinite().all()]
