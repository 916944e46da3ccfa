"""Taps, edits and truncation of the decoder against transformers' own hidden states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steerlora.lm.decoder import (
    EditedLayer,
    continued,
    decoder_of,
    edited,
    layers_of,
    layers_path,
    residual_streams,
    spliced_logits,
)


def test_decoder_is_found_and_its_absence_explained(make_model):
    model = make_model()
    assert decoder_of(model) is model.model
    assert layers_of(model) is model.model.layers
    assert layers_path(model) == "model.layers"
    with pytest.raises(ValueError, match=r"no decoder: .* 0 \(Linear\)"):
        decoder_of(nn.Sequential(nn.Linear(2, 2)))


def test_streams_are_the_hidden_states_and_the_forward_stops_there(make_model, tokens):
    model = make_model()
    ids, mask = tokens([5, 8])
    expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    streams = residual_streams(model, ids, mask, [2, 0, 1])
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()
    for site in (0, 1, 2):
        assert torch.equal(streams[site], expected[site])
    # Site L is the stream before the final norm, which transformers does not return.
    last = residual_streams(model, ids, mask, [3])[3]
    torch.testing.assert_close(model.model.norm(last), expected[3])
    assert not any(isinstance(layer, EditedLayer) for layer in model.model.layers)


def test_streams_of_an_adapted_model_are_the_adapted_streams(make_model, make_adapter, tokens):
    model = make_model()
    make_adapter(model)
    ids, mask = tokens([5, 8])
    expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    streams = residual_streams(model, ids, mask, [0, 1, 2])
    for site in (0, 1, 2):
        assert torch.equal(streams[site], expected[site])


def test_a_forward_can_be_cut_at_a_site_and_continued(make_model, tokens):
    model = make_model()
    ids, mask = tokens([5, 8])
    stream = residual_streams(model, ids, mask, [1])[1]
    hidden = continued(model, stream, 1, 3, attention_mask=mask)
    logits = model.lm_head(model.model.norm(hidden))
    assert torch.equal(logits, model(ids, attention_mask=mask).logits)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3


def test_edits_act_inside_their_context_only(make_model, tokens):
    model = make_model()
    ids, mask = tokens([6])
    before = model(ids, attention_mask=mask).logits
    layers = list(model.model.layers)
    assert torch.equal(spliced_logits(model, ids, mask, 1, lambda stream: stream), before)
    zeroed = spliced_logits(model, ids, mask, 2, torch.zeros_like)
    assert not torch.allclose(zeroed, before)
    with pytest.raises(RuntimeError, match="stop"), edited(model, {1: _raise}):
        model(ids, attention_mask=mask)
    assert all(a is b for a, b in zip(layers, model.model.layers, strict=True))
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def _raise(stream):
    raise RuntimeError("stop")


def test_a_wrapped_layer_shows_the_attributes_of_the_layer(make_model):
    layer = make_model().model.layers[0]
    wrapped = EditedLayer(layer, lambda stream: stream)
    assert wrapped.self_attn is layer.self_attn
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapped.no_such_thing
