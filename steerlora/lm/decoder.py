"""The decoder of any causal language model of transformers, in parts: layers, taps, truncation.

B batch, S sequence, D model width, L layers. A *site* c names the residual stream entering layer c.
Layers are wrapped, never hooked: sharding engines remove forward hooks between stages.

The layers are found by type (a list as long as the model is deep), whatever the family calls them;
the final norm, which is like any other norm, by its name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")
"""What families call the norm between the last layer and the output head."""
AFTER_LAYERS = (*FINAL_NORMS, "project_out")
"""Parts of a decoder that the stream passes after its last layer."""


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of layers inside a causal language model (embeddings, layers, final norm).

    Raises:
        ValueError: no sub-module holds the list of layers; the message lists what there is.
    """
    candidates = [getattr(model, "model", None), getattr(model, "transformer", None), model]
    if hasattr(model, "get_decoder"):
        candidates.insert(0, model.get_decoder())
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and _layers_name(candidate):
            return candidate
    found = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    raise ValueError(
        f"{type(model).__name__} has no decoder: no list of as many layers as its config says; "
        f"its parts are: {found}"
    )


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, lowest first; assigning to it wraps them."""
    decoder = decoder_of(model)
    return getattr(decoder, _layers_name(decoder))


def layers_path(model: nn.Module) -> str:
    """The dotted name of that list inside ``model``, such as "model.layers" or "transformer.h"."""
    layers = layers_of(model)
    return next(name for name, module in model.named_modules() if module is layers)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the output head.

    Raises:
        ValueError: the model has none that is known by name.
    """
    decoder = decoder_of(model)
    return getattr(decoder, _norm_name(decoder))


def _layers_name(decoder: nn.Module) -> str | None:
    depth = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name
    return None


def _norm_name(decoder: nn.Module) -> str:
    for name in FINAL_NORMS:
        if isinstance(getattr(decoder, name, None), nn.Module):
            return name
    found = ", ".join(f"{n} ({type(child).__name__})" for n, child in decoder.named_children())
    raise ValueError(
        f"{type(decoder).__name__} has no final norm named {', '.join(FINAL_NORMS)}, so no stream "
        f"can be read after its last layer; its parts are: {found}"
    )


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """What leaves the final norm, [B, S, D], without a cache.

    With ``position_ids`` rows are packed: each holds several samples, none of which attends to
    another. The masking of transformers (``find_packed_sequence_indices``) takes every position
    that does not go on from the one before it for another sample, if it is given positions and no
    mask; so padding, at position -1, is seen by itself alone, and an attached adapter tells real
    tokens by their positions.

    What packing costs: attention over all S^2 pairs of a row, under a boolean mask of B*S^2 bytes
    a forward (a second one where there are sliding layers) that all layers share. Under CUDA the
    attention turns it into the type of the queries, 2*B*S^2 bytes in bfloat16, which every layer
    keeps for its backward unless activations are recomputed.

    Args:
        model: a causal language model.
        input_ids: [B, S].
        attention_mask: [B, S], 1 on real tokens.
        position_ids: [B, S], from 0 in every sample, -1 on padding; None: a sample a row.
    """
    return decoder_of(model)(
        input_ids=input_ids,
        attention_mask=attention_mask if position_ids is None else None,
        position_ids=position_ids,
        use_cache=False,
    ).last_hidden_state


def check_packing(model: nn.Module) -> None:
    """Refuse a model that would let packed samples see each other.

    Raises:
        ValueError: layers that are not softmax attention, attention that is masked in another way
            than transformers' ``create_causal_mask``, or positions that are not rotary.
    """
    decoder = decoder_of(model)
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    attention = decoder.config._attn_implementation
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layers of type {', '.join(sorted(others))} carry one sample into another"
        )
    if attention not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(f"attention {attention!r} is not masked by sample: load it with 'sdpa'")
    if not hasattr(sys.modules[type(decoder).__module__], "create_causal_mask"):
        raise ValueError(f"{type(decoder).__name__} makes masks of its own, which know no samples")
    if not hasattr(decoder, "rotary_emb"):
        raise ValueError(f"{type(decoder).__name__} has no rotary positions")


class Wrapper(nn.Module):
    """A module in the place of another one, for which it answers what it does not have itself."""

    wrapped: str
    """Name of the child that holds the other one."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.wrapped), name)


class EditedLayer(Wrapper):
    """A decoder layer whose incoming stream first passes through ``edit``.

    ``edit`` maps the stream [B, S, D] to one of the same shape: it may look, record or replace.
    It runs outside the layer, so a recomputation of the layer (activation checkpointing) does not
    run it again.
    """

    wrapped = "layer"

    def __init__(self, layer: nn.Module, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.edit = edit

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return self.layer(self.edit(hidden_states), *args, **kwargs)


@contextmanager
def edited(model: nn.Module, edits: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Run ``model`` with :func:`attach_edits`, inside this context only."""
    attach_edits(model, edits)
    try:
        yield
    finally:
        remove_edits(model, edits)


def _reader(model: nn.Module, site: int) -> tuple[nn.Module, str]:
    """Whose child, and under which name, reads the stream of ``site``: a layer, or the norm."""
    decoder, layers = decoder_of(model), layers_of(model)
    return (decoder, _norm_name(decoder)) if site == len(layers) else (layers, str(site))


def attach_edits(model: nn.Module, edits: dict[int, Callable[[Tensor], Tensor]]) -> None:
    """Edit the stream of each given site, until :func:`remove_edits`.

    Site L is the stream that leaves the last layer. Whatever wraps a layer already stays, and runs
    after the edit.
    """
    for site, edit in edits.items():
        owner, name = _reader(model, site)
        setattr(owner, name, EditedLayer(getattr(owner, name), edit))


def remove_edits(model: nn.Module, sites: Iterable[int]) -> None:
    """Undo :func:`attach_edits`: the layers are the modules that they were."""
    for site in sites:
        owner, name = _reader(model, site)
        setattr(owner, name, getattr(owner, name).layer)


def _layer_range(model: nn.Module, start: int, stop: int | None) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder with layers [start, stop) only and nothing after them, and its layers.

    Every weight is shared; the ``last_hidden_state`` is the stream entering layer ``stop``. With no
    ``stop`` the decoder goes on to its end, and that is what leaves the final norm.
    """
    decoder = decoder_of(model)
    part = copy.copy(decoder)
    vars(part).pop("forward", None)  # an attached adapter's: it is bound to the whole decoder
    part._modules = dict(decoder._modules)
    layers = nn.ModuleList(layers_of(model)[start:stop])
    setattr(part, _layers_name(decoder), layers)
    for name in AFTER_LAYERS if stop is not None else ():
        if isinstance(getattr(part, name, None), nn.Module):
            setattr(part, name, nn.Identity())
    part.config = copy.copy(decoder.config)
    part.config.num_hidden_layers = len(layers)
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = part.config.layer_types[start:stop]
    return part, layers


def continued(model: nn.Module, stream: Tensor, start: int, stop: int | None, **inputs) -> Tensor:
    """The stream entering layer ``stop``, computed from the one that enters layer ``start``.

    Args:
        model: a causal language model.
        stream: [B, S, D]. It replaces what reaches layer ``start``, since families scale
            embeddings, or add positions to them, before their first layer.
        start, stop: layers [start, stop) run; with no ``stop`` all from ``start`` on and the final
            norm, whose output is then returned.
        inputs: what else the decoder takes, such as a mask.

    Returns:
        [B, S, D].
    """
    part, layers = _layer_range(model, start, stop)
    owner, name = (layers, "0") if len(layers) else (part, _norm_name(part))
    setattr(owner, name, EditedLayer(getattr(owner, name), lambda _: stream))
    return part(inputs_embeds=stream, use_cache=False, **inputs).last_hidden_state


@torch.no_grad()
def residual_streams(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    sites: Sequence[int],
    **inputs,
) -> dict[int, Tensor]:
    """The residual streams entering layers ``sites``, in one forward that stops at the last.

    Args:
        model: a causal language model.
        input_ids: [B, S].
        attention_mask: [B, S], 1 on real tokens.
        sites: layer indices in [0, L]; L is the stream leaving the last layer, before the norm.
        inputs: what else the decoder takes, such as position_ids or a KV cache; without, no cache.

    Returns:
        {site: [B, S, D]} in the model's dtype, where ``input_ids`` is.
    """
    part, layers = _layer_range(model, 0, max(sites))
    streams: dict[int, Tensor] = {}

    def record(site: int, stream: Tensor) -> Tensor:
        streams[site] = stream
        return stream

    for site in sites:
        if site < max(sites):
            layers[site] = EditedLayer(layers[site], partial(record, site))
    inputs = {"use_cache": False, **inputs}
    output = part(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    streams[max(sites)] = output.last_hidden_state
    if input_ids is not None:  # a model may be spread over several devices
        streams = {site: stream.to(input_ids.device) for site, stream in streams.items()}
    return streams


@torch.no_grad()
def spliced_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    site: int,
    edit: Callable[[Tensor], Tensor],
) -> Tensor:
    """Logits [B, S, V] with ``edit`` applied to the stream entering layer ``site``."""
    with edited(model, {site: edit}):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
