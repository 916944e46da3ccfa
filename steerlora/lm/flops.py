"""Floating-point operations a token, counted as the methods here really spend them.

D model width, N latents, S sequence, r total rank.

A multiplication and its addition are two operations. Matrix products are counted, elementwise work
is not, and attention is counted over the whole sequence, without the causal half: the conventions
of the usual model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B), so that figures compare.
Model FLOPs leave recomputation out.
"""

from __future__ import annotations

from steerlora.lm.shapes import DecoderShape, layer_weights


def attention_flops(shape: DecoderShape, sequence: float) -> float:
    """Of one layer's forward: scores and their sum over values, 2 S each a query entry."""
    return 4 * sequence * shape.query_width


def harvesting_flops_per_token(shape: DecoderShape, layers: int, sequence: float) -> float:
    """Of a forward through the first ``layers`` layers, which is all that a harvest runs."""
    return layers * (2 * layer_weights(shape) + attention_flops(shape, sequence))


def pretraining_flops_per_token(shape: DecoderShape, sequence: float) -> float:
    """Of a step that trains every weight, all tokens labelled: forward, and twice it backward."""
    head = 2 * shape.vocabulary * shape.width
    return 3 * (harvesting_flops_per_token(shape, shape.layers, sequence) + head)


def training_flops_per_token(
    shape: DecoderShape,
    *,
    adapter_parameters: int,
    first_adapted_layer: int,
    sequence: float,
    labelled: float = 1.0,
    sae_parameters: int = 0,
) -> float:
    """Of a step that trains an adapter on a frozen base.

    - Forward: all layers, the low-rank products, the SAE's encoder, the head on labelled tokens.
    - Backward: through the head, and through the layers that are adapted, with respect to
      activations only; queries, keys and values of the first of them need none. A low-rank product
      costs twice its forward, for its own weights train.

    Args:
        shape: of the base.
        adapter_parameters: of the low-rank matrices, A and B together. Routers are left out: they
            read K rows of their tables a token.
        first_adapted_layer: c, the first control site.
        sequence: S, tokens of a row.
        labelled: share of the tokens that the loss counts.
        sae_parameters: of the encoders that run, D N each; their arithmetic is float32.
    """
    adapted = shape.layers - first_adapted_layer
    weights, attention = layer_weights(shape), attention_flops(shape, sequence)
    forward = shape.layers * (2 * weights + attention) + 2 * adapter_parameters
    first = sum(shape.linears[name][0] * shape.linears[name][1] for name in _FIRST_INPUTS)
    backward = adapted * (2 * weights + 2 * attention) - 2 * first + 4 * adapter_parameters
    head = labelled * 4 * shape.vocabulary * shape.width
    return forward + backward + head + 2 * sae_parameters


def splicing_flops_per_token(shape: DecoderShape, first_layer: int, sequence: float) -> float:
    """Of a step that trains what takes the place of the stream entering a layer of a frozen base.

    The base runs once, and the layers from there on a second time, with a backward with respect to
    activations only; the head, on all tokens, likewise. What is trained is not counted.

    Args:
        shape: of the base.
        first_layer: the layer whose incoming stream is replaced.
        sequence: S, tokens of a row.
    """
    above = shape.layers - first_layer
    forward = harvesting_flops_per_token(shape, shape.layers + above, sequence)
    backward = above * (2 * layer_weights(shape) + 2 * attention_flops(shape, sequence))
    return forward + backward + 3 * 2 * shape.vocabulary * shape.width


def distilling_flops_per_token(
    shape: DecoderShape,
    *,
    adapter_parameters: int,
    begins: int,
    first_adapted_layer: int,
    sequence: float,
    cached: bool = False,
    sae_parameters: int = 0,
) -> float:
    """Of a step that trains an adapter by its divergence from the frozen base.

    The base runs once without gradient, as far as it is not cached; the adapted model runs from the
    layer on in which it begins to differ, with a backward as in :func:`training_flops_per_token`.
    The head, on all tokens, has both forwards and one backward.

    Args:
        shape: of the base.
        adapter_parameters: of the low-rank matrices, A and B together.
        begins: the layer from which on the adapted model runs.
        first_adapted_layer: down to which its backward goes.
        sequence: S, tokens of a row.
        cached: whether the base's streams are known.
        sae_parameters: of the encoders that run, D N each.
    """
    weights, attention = layer_weights(shape), attention_flops(shape, sequence)
    base = 0.0 if cached else harvesting_flops_per_token(shape, shape.layers, sequence)
    forward = (shape.layers - begins) * (2 * weights + attention) + 2 * adapter_parameters
    first = sum(shape.linears[name][0] * shape.linears[name][1] for name in _FIRST_INPUTS)
    backward = (shape.layers - first_adapted_layer) * (2 * weights + 2 * attention) - 2 * first
    head = 3 * 2 * shape.vocabulary * shape.width
    return base + forward + backward + 4 * adapter_parameters + head + 2 * sae_parameters


_FIRST_INPUTS = ("q_proj", "k_proj", "v_proj")
"""Modules whose input, in the first adapted layer, comes from the frozen layers below."""
