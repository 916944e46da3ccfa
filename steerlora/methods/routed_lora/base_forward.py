"""A second forward, of the frozen base, where control sites do not read the current streams.

B batch, S sequence, D model width.

Its KV cache lies in the adapted model's, as a layer of it (``lm/caches.py``): so both always hold
the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from steerlora.lm.caches import CacheLayer
from steerlora.lm.decoder import decoder_of, final_norm, layers_of, residual_streams
from steerlora.methods.routed_lora.site import CurrentForward

if TYPE_CHECKING:
    from steerlora.methods.routed_lora.adapter import Adapter

OWNER = "base"
"""Of the layer that holds the base's KV cache."""


@torch.no_grad()
def read_base(adapter: Adapter, model: nn.Module, given: dict[str, Any]) -> None:
    """Note the streams of the frozen base for the forward that begins, if ``source`` says so.

    With one site and source "base" there is nothing to do: below it nothing is adapted. (But what
    leaves the site's own layer is.)

    Args:
        adapter: attached to the base.
        model: the base.
        given: {argument: value} of the decoder's forward.

    Raises:
        RuntimeError: a KV cache with tokens that the base's has not seen.
    """
    source, sites, read = adapter.config.source, list(adapter.sites), adapter.config.streams
    if source == "inline" or not sites:
        return
    if source == "base" and len(sites) < 2 and read == sites:
        return
    forward = adapter.forward_state
    cached = forward.cache is not None or _makes_cache(model, given)
    forward.base_cache = _cache(forward, source) if cached else None
    kept = ("position_ids", "inputs_embeds", "cache_position")
    last = len(layers_of(model))
    with adapter.disabled():
        streams = residual_streams(
            model,
            given.get("input_ids"),
            forward.mask_so_far(),
            [last] if source == "base_last" else read,
            past_key_values=forward.base_cache,
            use_cache=cached,
            **{name: given[name] for name in kept if name in given},
        )
    if source == "base_last":
        forward.base_streams = dict.fromkeys(sites, final_norm(model)(streams[last]))
    else:
        pairs = zip(sites, read, strict=True)
        forward.base_streams = {site: streams[stream] for site, stream in pairs}


def keep_base(forward: CurrentForward, cache: Cache | None) -> None:
    """Put the base's KV cache into that of the forward that has ended."""
    if cache is not None and forward.base_cache is not None:
        CacheLayer.at(cache, OWNER).cache = forward.base_cache
    forward.base_cache = None


def _cache(forward: CurrentForward, source: str) -> Cache:
    """The base's KV cache of the same tokens."""
    if forward.mixed:
        raise RuntimeError(
            f"method.source={source} runs the base beside the model, which continuous batching "
            "does not: use generate()"
        )
    if not forward.continuing:
        return DynamicCache()
    layer = CacheLayer.of(forward.cache, OWNER)
    if layer is None or layer.get_seq_length() != forward.past:
        raise RuntimeError(
            "the KV cache holds tokens that this adapter has not seen, and "
            f"method.source={source} reads the base's: begin with an empty cache"
        )
    return layer.cache


def _makes_cache(model: nn.Module, given: dict[str, Any]) -> bool:
    """Whether a decoder that is called with these arguments, and no KV cache, will make one."""
    use = given.get("use_cache")
    return bool(decoder_of(model).config.use_cache if use is None else use)
