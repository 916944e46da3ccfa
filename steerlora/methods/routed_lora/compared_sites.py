"""The features of the adapted streams at all control sites, beside those of the base's own.

B batch, S sequence, D model width, T tokens that carry a signal, N latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerlora.lm.decoder import edited
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.taxonomy import Taxonomy


class ComparedSite(NamedTuple):
    """One site after a forward.

    Attributes:
        adapted: z_ft of the tokens, values and indices [T, K], with gradient in the stream.
        base: z_base of the same tokens, [T, K'].
        taxonomy: of the features, on the tokens' device.
    """

    adapted: SparseFeatures
    base: SparseFeatures
    taxonomy: Taxonomy


class ComparedSites:
    """Watches what leaves the layers of an adapter's sites (``method.reads=output``).

    The base's streams are those that the adapter has read for its own routing: no further forward.

    Args:
        model: a causal language model.
        adapter: attached to it.
        taxonomies: {site: of its features}.

    Raises:
        ValueError: a site without a taxonomy.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, taxonomies: Mapping[int, Taxonomy]
    ) -> None:
        missing = [site for site in adapter.sites if site not in taxonomies]
        if missing:
            raise ValueError(f"no taxonomy of the features at control site {missing[0]}")
        self.model, self.adapter = model, adapter
        self.taxonomies = {site: taxonomies[site] for site in adapter.sites}
        self._streams: dict[int, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the streams of the model's forward inside this context: the last one's, of several.

        The base's forward comes before the adapted one, and is recorded over.
        """
        self._streams = {}
        streams = dict(zip(self.adapter.sites, self.adapter.config.streams, strict=True))
        edits = {stream: self._record(site) for site, stream in streams.items()}
        with edited(self.model, edits):
            yield

    def found(self) -> Iterator[ComparedSite]:
        """The sites of the recorded forward, lowest first."""
        for site, stream in self._streams.items():
            sae = self.adapter.saes[site]
            stream = stream.to(self.adapter.active.device)
            base = self.adapter.forward_state.base_streams[site].to(stream.device)
            counted = self.adapter.tokens_with_signal(stream)
            with torch.no_grad():
                before = sae.encode(base[counted])
            yield ComparedSite(sae.encode(stream[counted]), before, self._taxonomy(site, sae))

    def _taxonomy(self, site: int, sae: SparseAutoencoder) -> Taxonomy:
        held = self.taxonomies[site]
        if held.general.device != sae.W_enc.device:
            held = Taxonomy(*(part.to(sae.W_enc.device) for part in held))
            self.taxonomies[site] = held
        return held

    def _record(self, site: int) -> Callable[[Tensor], Tensor]:
        def edit(stream: Tensor) -> Tensor:
            self._streams[site] = stream
            return stream

        return edit
