"""The features of the adapted stream above a method, beside those of the base's own stream.

B batch, S sequence, T tokens that carry a signal (``method.signal_tokens``), D model width,
L layers, N latents, K active latents.

The stream entering the first adapted layer c is the base model's own. So the base's stream at the
monitor site needs layers [c, site) only, from that stream on: no second forward of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.lm.decoder import continued, decoder_of, edited, layers_of
from steerlora.lm.forwards import ForwardArguments, ObservedForward
from steerlora.methods.base import Method
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.sparse import SparseFeatures, is_dense
from steerlora.saes.taxonomy import Taxonomy


def squared_change(adapted: SparseFeatures, base: SparseFeatures, counted: Tensor) -> Tensor:
    """Sum over tokens and over the latents ``counted`` [N] bool of (z_ft - z_base)^2.

    A token's two lists of latents are joined and sorted, so that a latent active in both stands
    twice in a row: O(T K log K), without a [T, N] tensor, and exactly zero where nothing changed.
    Dense features are subtracted as they are.
    """
    latents = len(counted)
    if is_dense(adapted, latents) or is_dense(base, latents):
        change = adapted.dense(latents) - base.dense(latents)
        return (change.square() * counted).sum()
    values = torch.cat([adapted.values, -base.values], -1)
    # An inactive entry's index means nothing: it goes to latent N, which never counts.
    indices = torch.cat([adapted.indices, base.indices], -1)
    indices = indices.masked_fill(values == 0, len(counted))
    indices, order = indices.sort(dim=-1)
    values = values.gather(-1, order)
    repeated = F.pad(indices[:, 1:] == indices[:, :-1], (1, 0))
    following = F.pad(values[:, 1:] * repeated[:, 1:], (0, 1))
    kept = F.pad(counted, (0, 1))[indices] & ~repeated
    return ((values + following).square() * kept).sum()


class Monitor:
    """Watches one stream of a model that a method is attached to.

    Args:
        model: a causal language model.
        method: what is attached to it.
        sae: of the stream watched; it keeps its own type.
        layer: the stream entering this layer; L: the one leaving the last layer, before the norm.
        taxonomy: of that SAE's features.

    Attributes:
        general: [N] bool, on the device of the stream last read; so are the other two.
        domain: [D, N] bool, each domain's own features.
        prototypes: [D, N].

    Raises:
        ValueError: a layer below which nothing is adapted, or beyond the last; an SAE or a taxonomy
            that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        sae: SparseAutoencoder,
        layer: int,
        taxonomy: Taxonomy,
    ) -> None:
        decoder, first = decoder_of(model), method.first_layer
        layers = len(layers_of(model))
        if not first < layer <= layers:
            raise ValueError(
                f"monitor site {layer}: choose from {first + 1} (above the first adapted layer) to "
                f"{layers} (the stream leaving the last layer)"
            )
        width, latents = sae.W_enc.shape
        if width != decoder.config.hidden_size:
            raise ValueError(
                f"the SAE at monitor site {layer} reads width {width}, the model has "
                f"{decoder.config.hidden_size}"
            )
        if latents != len(taxonomy.general):
            raise ValueError(
                f"the SAE at monitor site {layer} has {latents} latents, its taxonomy "
                f"{len(taxonomy.general)}"
            )
        self.model, self.method, self.layer = model, method, layer
        self.general, self.domain = taxonomy.general, taxonomy.domain
        self.prototypes = taxonomy.prototypes.float()
        self.sae = sae.eval().requires_grad_(False)
        self._first = first
        self._streams: dict[int, Tensor] = {}
        self._arguments = ForwardArguments()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the streams of the model's forward inside this context: the last one's, of several.

        Whatever wraps the layers already, a control site for one, stays in its place.
        """
        self._streams = {}
        observed = ObservedForward(self.model, self._arguments.note)
        try:
            sites = (self._first, self.layer)
            with edited(self.model, {site: self._record(site) for site in sites}):
                yield
        finally:
            observed.remove()

    def features(self) -> SparseFeatures:
        """z_ft of the recorded forward's tokens, [T, K], with gradient in the stream."""
        return self._encode(self._streams[self.layer])

    @torch.no_grad()
    def base_features(self) -> SparseFeatures:
        """z_base of the same tokens, [T, K]: what the model computes there with no method.

        Called after the recording, of which it would else become a part.
        """
        recorded = self._arguments
        positions = {"position_ids": recorded.position_ids}  # which not every family takes
        if recorded.position_ids is None:
            positions = {}
        with self.method.disabled():
            stream = continued(
                self.model,
                self._streams[self._first],
                self._first,
                self.layer,
                attention_mask=recorded.attention_mask,
                **positions,
            )
        return self._encode(stream)

    @torch.no_grad()
    def drift(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """How far the general features have moved on a batch [B, S], as a ratio's two parts.

        Returns:
            Sums over tokens and general latents of (z_ft - z_base)^2 and of z_base^2.
        """
        with self.recording():
            decoder_of(self.model)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
        adapted, base = self.features(), self.base_features()
        kept = base.values.square() * self.general[base.indices]
        return squared_change(adapted, base, self.general), kept.sum()

    def _record(self, site: int) -> Callable[[Tensor], Tensor]:
        def edit(stream: Tensor) -> Tensor:
            self._streams[site] = stream
            return stream

        return edit

    def _encode(self, stream: Tensor) -> SparseFeatures:
        if self.general.device != stream.device:
            self.sae.to(stream.device)
            for name in ("general", "domain", "prototypes"):
                setattr(self, name, getattr(self, name).to(stream.device))
        counted = self._arguments.signal_tokens(stream, self.method.signal_tokens)
        return self.sae.encode(stream[counted])
