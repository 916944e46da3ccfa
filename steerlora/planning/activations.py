"""What autograd keeps of one step of adapter training, and what comes on top of it at its peak.

T tokens of a part of the batch, S sequence, D model width, F width of the MLP, V vocabulary,
N latents, K active latents, E specialists, R rank of each, M adapted modules of a site.

Counted operation by operation from transformers' Qwen3, torch's scaled-dot-product attention and
this project's adapter, in bytes a token, and compared with what torch really keeps
(tests/planning/test_measured.py, on a CPU). CUDA's attention kernels keep the same tensors:
queries, keys, values, mask, output and the logarithm of the softmax's sums. A compiled model keeps
less.
"""

from __future__ import annotations

from typing import NamedTuple

from steerlora.config import AdapterConfig, ControlConfig
from steerlora.lm.shapes import DecoderShape
from steerlora.planning.parameters import AdapterParameters, adapted, site_layers

FLOAT = 4
"""Bytes of a float32, the type of norms, losses, routers and SAEs whatever the model's."""
INDEX = 8
"""Bytes of an index."""

COVARIANCE_RANK, DENSE_ENTRIES = 256, 2**24
"""Directions of a covariance and entries of a dense signal at once (``prototypes.py``)."""
POOLED_COPIES = 5
"""Tensors of that size at once: differences, squares, unit rows."""


class Part(NamedTuple):
    """What goes through the model at once on one rank.

    Attributes:
        rows: B.
        sequence: S, the longest row's.
        labelled: share of the tokens that the loss counts.
        element: bytes of an activation.
        copied: the adapter's weights are of another type, and copied for the products.
        padded: rows are of unequal length, or packed: attention has a mask, and kernels that take
            one have keys and values repeated for every head.
    """

    rows: int
    sequence: int
    labelled: float = 1.0
    element: int = 2
    copied: bool = True
    padded: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence


def layer_bytes(shape: DecoderShape, adapter: AdapterConfig, part: Part) -> float:
    """What an adapted layer keeps for its backward, a token. Its weights are frozen: the inputs of
    products are kept only where an adapter's own weights need them."""
    e, width, ffn = part.element, shape.width, shape.ffn_width
    query, key = shape.query_width, shape.key_width
    names = adapted(shape, adapter)
    kept = 2 * _norm_bytes(width)
    if shape.query_key_norm:
        kept += (shape.heads + shape.kv_heads) * _norm_bytes(shape.head_width)
    # Attention: queries and output, keys and values, one sum a head; a mask becomes additive.
    kept += e * (2 * query + 2 * (query if part.padded else key)) + FLOAT * shape.heads
    kept += e * part.sequence * part.padded
    kept += 3 * e * ffn  # gate before and after its activation, up
    kept += e * width * bool(names.keys() & {"q_proj", "k_proj", "v_proj"})
    kept += e * width * bool(names.keys() & {"gate_proj", "up_proj"})
    kept += e * ffn * ("down_proj" in names)  # o_proj's input is the attention's output
    # Rank components before and after their scale; a constant scale keeps the second alone.
    hidden = 1 if adapter.routing == "none" else 2
    return kept + hidden * e * adapter.specialists * adapter.rank * len(names)


def _norm_bytes(width: int) -> int:
    """RMSNorm's float32 copy of its input, and its scale."""
    return FLOAT * (width + 1)


def site_bytes(
    shape: DecoderShape, adapter: AdapterConfig, control: ControlConfig, k: int, part: Part
) -> float:
    """What all control sites keep of their routing, a token."""
    if adapter.routing == "none":
        return 0
    pairs = adapter.specialists * adapter.rank
    logits = adapter.specialists + adapter.rank * adapter.dynamic_rank
    signal = k * (FLOAT + INDEX) if adapter.routing == "sae" else FLOAT * shape.width
    kept = 0.0
    for covered in site_layers(shape, control.sites):
        routers = covered * len(adapted(shape, adapter)) if adapter.per_module else 1
        kept += signal + routers * (part.element * pairs + 5 * FLOAT * logits)
        if adapter.router == "mlp":
            # Units before and after their activation.
            kept += 2 * FLOAT * routers * adapter.router_hidden * (1 + adapter.dynamic_rank)
    if control.source != "inline" and len(control.sites) > 1:
        kept += part.element * shape.width * len(control.sites)  # the base's streams
    return kept


def prototype_buffer_bytes(
    shape: DecoderShape, adapter: AdapterConfig, control: ControlConfig, latents: int
) -> float:
    """Prototypes of all sites' routers, and the covariance that prototype routing knows."""
    if not _prototyped(adapter):
        return 0
    signal = latents if adapter.routing == "sae" else shape.width
    rows = adapter.specialists
    if adapter.router == "prototype":
        rows += 1 + adapter.whitened * min(COVARIANCE_RANK, signal)
    return FLOAT * len(control.sites) * rows * signal


def pooled_bytes(shape: DecoderShape, adapter: AdapterConfig, latents: int, part: Part) -> float:
    """A stretch of the averaged signal, dense, from which a cosine to prototypes is taken: a site
    computes with :data:`POOLED_COPIES` of them, and keeps none."""
    signal = latents if adapter.routing == "sae" else shape.width
    return _prototyped(adapter) * FLOAT * min(DENSE_ENTRIES, part.tokens * signal)


def _prototyped(adapter: AdapterConfig) -> bool:
    return adapter.routing != "none" and (adapter.prototypes or adapter.router == "prototype")


def weight_bytes(
    adapter: AdapterConfig, parameters: AdapterParameters, part: Part, share: float
) -> float:
    """What losses on the weights and copies of them keep, whatever the number of tokens.

    Args:
        share: of the adapted layers whose copies are there at once.
    """
    low_rank = parameters.low_rank
    kept = part.element * low_rank * part.copied * share
    if adapter.diversity and adapter.specialists > 1 and adapter.routing != "none":
        # Mixed precision casts both factors of the product; else B, read by column, is copied.
        cast, copied = 2 * part.element * low_rank, FLOAT * parameters.outputs
        kept += cast if part.copied else copied
    return kept


def monitor_bytes(shape: DecoderShape, adapter: AdapterConfig, k: int, part: Part) -> float:
    """What the preservation and steering losses keep, a token: two streams and their features."""
    if not adapter.monitored:
        return 0
    return 2 * part.element * shape.width + FLOAT * shape.width + 8 * k * (FLOAT + INDEX)


def loss_bytes(shape: DecoderShape, part: Part) -> float:
    """At the loss: logits of labelled tokens in float32, their softmax and its gradient."""
    return 3 * FLOAT * shape.vocabulary * part.labelled * part.tokens


def backward_bytes(shape: DecoderShape, part: Part) -> float:
    """On top of what is kept, while the first layers of the backward run: gradients of the MLP's
    inner stream, or of the final norm in float32."""
    return part.tokens * max(2 * part.element * shape.ffn_width, 5 * FLOAT * shape.width)


def forward_bytes(shape: DecoderShape, part: Part) -> float:
    """On top of what is kept, in a layer's forward without gradients: the stream and its norm, and
    the MLP's three inner streams, or five of the queries at their rotation with keys and values."""
    e, query, key = part.element, shape.query_width, shape.key_width
    mlp, rotation = 3 * e * shape.ffn_width, e * (5 * query + 2 * key)
    norms = 3 * FLOAT * max(shape.width, query * shape.query_key_norm)
    return part.tokens * (2 * e * shape.width + max(mlp, rotation, norms))
