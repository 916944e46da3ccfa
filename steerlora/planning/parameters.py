"""How many parameters: of the base, of an adapter, of an SAE.

D model width, N latents, E specialists, R rank of each, M adapted modules of a site, H hidden units
of a perceptron router.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from steerlora.config import AdapterConfig, ControlConfig
from steerlora.lm.shapes import DecoderShape, layer_weights

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class BaseParameters(NamedTuple):
    """Of a whole base model."""

    embedding: int
    layer: int
    """Of one decoder layer."""
    layers: int
    """Of all of them."""
    head: int
    """0 where it is the embedding."""
    total: int
    """With the final norm."""


class AdapterParameters(NamedTuple):
    """What trains."""

    low_rank: int
    """A and B of every adapted module."""
    outputs: int
    """B alone, of every adapted module."""
    routers: int

    @property
    def total(self) -> int:
        return self.low_rank + self.routers


def base_parameters(shape: DecoderShape) -> BaseParameters:
    """Of a decoder; norms included, biases not (Qwen3 and Llama have none)."""
    norms = 2 * shape.width + 2 * shape.head_width * shape.query_key_norm
    layer = layer_weights(shape) + norms
    embedding = shape.vocabulary * shape.width
    head = 0 if shape.tied else embedding
    layers = shape.layers * layer
    return BaseParameters(embedding, layer, layers, head, embedding + layers + shape.width + head)


def adapted(shape: DecoderShape, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """{name: (inputs, outputs)} of a layer's adapted modules."""
    wanted = ["*"] if config.target_modules is None else config.target_modules
    return {
        name: sizes
        for name, sizes in shape.linears.items()
        if any(fnmatchcase(n, pattern) for n in (name, path_of(name)) for pattern in wanted)
    }


def path_of(name: str) -> str:
    """A linear module's path inside its layer, in transformers' Qwen3, Llama and Gemma."""
    return f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def adapter_parameters(
    shape: DecoderShape, adapter: AdapterConfig, control: ControlConfig, latents: int
) -> AdapterParameters:
    """Of an adapter; sites and modules as ``methods/routed_lora`` have them.

    Args:
        latents: N of the sites' SAEs.
    """
    rank, modules = adapter.specialists * adapter.rank, adapted(shape, adapter)
    depth = shape.layers - min(control.sites)
    outputs = depth * rank * sum(sizes[1] for sizes in modules.values())
    inputs = depth * rank * sum(sizes[0] for sizes in modules.values())
    routers = sum(_routers(shape, adapter, control, latents))
    return AdapterParameters(inputs + outputs, outputs, routers)


def site_layers(shape: DecoderShape, sites: Sequence[int]) -> list[int]:
    """Layers that each control site governs."""
    ends = [*sites[1:], shape.layers]
    return [end - site for site, end in zip(sites, ends, strict=True)]


def _routers(
    shape: DecoderShape, adapter: AdapterConfig, control: ControlConfig, latents: int
) -> list[int]:
    """Entries of every site's learnt router."""
    if adapter.routing == "none" or adapter.router == "prototype":
        return []
    signal = latents if adapter.routing == "sae" else shape.width
    modules = len(adapted(shape, adapter))
    logits = [adapter.specialists] + [adapter.rank] * adapter.dynamic_rank
    found = []
    for covered in site_layers(shape, control.sites):
        copies = covered * modules if adapter.per_module else 1
        if adapter.router == "linear":
            found.append(copies * sum(logits) * (signal + 1))
        else:
            hidden = adapter.router_hidden
            first, second = len(logits) * hidden * (signal + 1), sum(logits) * (hidden + 1)
            found.append(copies * (first + second))
    return found


def sae_parameters(width: int, latents: int) -> int:
    """Encoder, decoder and both biases: 2 D N + N + D."""
    return 2 * width * latents + latents + width


def base_sizes(shape: DecoderShape) -> dict[int, int]:
    """{entries of a parameter: how many such parameters} of a base."""
    sizes = Counter({shape.width: 2 * shape.layers + 1})
    for inputs, outputs in shape.linears.values():
        sizes[inputs * outputs] += shape.layers
    if shape.query_key_norm:
        sizes[shape.head_width] += 2 * shape.layers
    sizes[shape.vocabulary * shape.width] += 1 if shape.tied else 2
    return dict(sizes)


def adapter_sizes(
    shape: DecoderShape, adapter: AdapterConfig, control: ControlConfig, latents: int
) -> dict[int, int]:
    """Likewise of an adapter's trainable parameters; a router counts as one for every site."""
    rank, depth = adapter.specialists * adapter.rank, shape.layers - min(control.sites)
    sizes: Counter[int] = Counter()
    for widths in adapted(shape, adapter).values():
        for width in widths:
            sizes[rank * width] += depth
    for router in _routers(shape, adapter, control, latents):
        sizes[router] += 1
    return dict(sizes)
