"""The features of the adapted stream above the adapters, beside those of the base's own stream.

B batch, S sequence, T real tokens, D model width, L layers, N latents, K active latents.

The stream entering the first adapted layer c is the base model's own. So the base's stream at the
monitor site needs layers [c, site) only, from that stream on: no second forward of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steerlora.lm.decoder import continued, decoder_of, edited, layers_of
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.losses import squared_change
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.taxonomy import Taxonomy


class Monitor:
    """Watches one stream of a model that carries an adapter.

    Args:
        model: a causal language model, with ``adapter`` attached.
        adapter: what is attached to it.
        sae: of the stream watched; it keeps its own type.
        layer: the stream entering this layer; L: the one leaving the last layer, before the norm.
        taxonomy: of that SAE's features.

    Attributes:
        general: [N] bool, on the device of the stream last read; so are the other two.
        domain: [D, N] bool, each domain's own features.
        prototypes: [D, N].

    Raises:
        ValueError: a layer that no adapter lies below, or beyond the last; an SAE or a taxonomy
            that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        sae: SparseAutoencoder,
        layer: int,
        taxonomy: Taxonomy,
    ) -> None:
        decoder, first = decoder_of(model), min(adapter.shape.sites)
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
        self.model, self.adapter, self.layer = model, adapter, layer
        self.general, self.domain = taxonomy.general, taxonomy.domain
        self.prototypes = taxonomy.prototypes.float()
        self.sae = sae.eval().requires_grad_(False)
        self._first = first
        self._streams: dict[int, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the streams of the model's forward inside this context: the last one's, of several.

        Whatever wraps the layers already, a control site for one, stays in its place.
        """
        self._streams = {}
        with edited(self.model, {site: self._record(site) for site in (self._first, self.layer)}):
            yield

    def features(self) -> SparseFeatures:
        """z_ft of the recorded forward's real tokens, [T, K], with gradient in the stream."""
        return self._encode(self._streams[self.layer])

    @torch.no_grad()
    def base_features(self) -> SparseFeatures:
        """z_base of the same tokens, [T, K]: what the model computes there with no adapter.

        Called after the recording, of which it would else become a part.
        """
        recorded = self.adapter.forward_state
        positions = {"position_ids": recorded.position_ids}  # which not every family takes
        if recorded.position_ids is None:
            positions = {}
        with self.adapter.disabled():
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
            Sums over real tokens and general latents of (z_ft - z_base)^2 and of z_base^2.
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
        return self.sae.encode(stream[self.adapter.real_tokens(stream)])
