"""Taps, edits and truncation of the decoder against transformers' own hidden states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from steerlora.lm.decoder import (
    EditedLayer,
    attach_edits,
    continued,
    decoder_of,
    edited,
    layers_of,
    layers_path,
    remove_edits,
    residual_streams,
    spliced_logits,
)
from steerlora.lm.forwards import ForwardArguments, ObservedForward


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


def test_attached_edits_stay_until_they_are_removed(make_model, tokens):
    model = make_model()
    ids, mask = tokens([6])
    layers, before = list(model.model.layers), model(ids, attention_mask=mask).logits
    order = []

    def noting(name: str, factor: float):
        return lambda stream: order.append(name) or stream * factor

    attach_edits(model, {0: noting("inner 0", 1.0), 2: noting("2", 0.5)})
    attach_edits(model, {0: noting("outer 0", 1.0)})
    edited_logits = model(ids, attention_mask=mask).logits
    assert order == ["outer 0", "inner 0", "2"]
    expected = spliced_logits(make_model(), ids, mask, 2, lambda stream: stream * 0.5)
    assert torch.equal(edited_logits, expected)
    remove_edits(model, [0])
    assert torch.equal(model(ids, attention_mask=mask).logits, edited_logits)
    assert order[3:] == ["inner 0", "2"]
    remove_edits(model, [0, 2])
    assert all(now is then for now, then in zip(model.model.layers, layers, strict=True))
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


# What watches a forward


def test_a_forward_is_observed_by_the_names_of_its_arguments(make_model, tokens):
    model = make_model()
    ids, mask = tokens([6, 4])
    before, seen = model(ids, attention_mask=mask).logits, []
    observed = ObservedForward(model, seen.append)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    model.model(ids, mask)  # by position
    for given in seen:
        assert torch.equal(given["input_ids"], ids)
        assert torch.equal(given["attention_mask"], mask)
    # The model truncated is another one, which nobody observes.
    streams = residual_streams(model, ids, mask, [2])[2]
    assert torch.equal(streams, residual_streams(make_model(), ids, mask, [2])[2])
    assert len(seen) == 2
    observed.remove()
    assert "forward" not in vars(model.model)
    model(ids, attention_mask=mask)
    assert len(seen) == 2


def test_an_observer_within_another_gives_it_back(make_model, tokens):
    model = make_model()
    ids, _ = tokens([6])
    order = []
    outer = ObservedForward(model, lambda given: order.append("first"))
    own = model.model.forward
    inner = ObservedForward(model, lambda given: order.append("second"))
    model(ids)
    assert order == ["second", "first"]
    inner.remove()
    assert model.model.forward is own
    model(ids)
    assert order[2:] == ["first"]
    outer.remove()
    assert "forward" not in vars(model.model)


def test_a_decoder_without_keys_and_values_is_not_observed():
    mamba = AutoConfig.for_model("mamba", vocab_size=61, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(mamba)
    with pytest.raises(ValueError, match="MambaModel keeps no keys and values"):
        ObservedForward(model, lambda given: None)
    assert "forward" not in vars(decoder_of(model))


STREAM = torch.zeros(2, 3, 4)
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
POSITIONS = torch.tensor([[0, 1, 0], [0, -1, -1]])
REAL = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()  # two columns are free yet
SEES = (torch.ones(3, 5).tril().bool() & REAL[:, None])[:, None]


@pytest.mark.parametrize(
    ("given", "real"),
    [
        ({}, [[1, 1, 1], [1, 1, 1]]),
        ({"attention_mask": MASK[:, :3]}, [[0, 1, 1], [1, 1, 1]]),
        ({"attention_mask": MASK}, [[1, 1, 1], [1, 1, 0]]),  # with a KV cache: its end
        ({"position_ids": POSITIONS}, [[1, 1, 1], [1, 0, 0]]),  # packed rows
        ({"position_ids": POSITIONS[1:]}, [[1, 0, 0], [1, 0, 0]]),
        ({"position_ids": POSITIONS, "attention_mask": MASK[:, :3]}, [[0, 1, 1], [1, 1, 1]]),
        # A mask [B, 1, S, columns], or one of each kind of layer: padding does not see itself.
        ({"attention_mask": torch.zeros(2, 1, 3, 3)}, [[1, 1, 1], [1, 1, 1]]),
        ({"attention_mask": SEES}, [[0, 1, 1], [1, 1, 0]]),
        (
            {"attention_mask": torch.zeros(SEES.shape).masked_fill(~SEES, -9e9)},
            [[0, 1, 1], [1, 1, 0]],
        ),
        ({"attention_mask": {"sliding": None, "full_attention": SEES}}, [[0, 1, 1], [1, 1, 0]]),
        ({"attention_mask": {"sliding": SEES}}, [[0, 1, 1], [1, 1, 0]]),
        ({"attention_mask": {"full_attention": None}, "position_ids": POSITIONS}, None),
    ],
)
def test_real_tokens_follow_from_the_arguments(given, real):
    arguments = ForwardArguments()
    arguments.note({"input_ids": torch.ones(2, 3), **given})
    expected = POSITIONS >= 0 if real is None else torch.tensor(real).bool()
    assert torch.equal(arguments.real_tokens(STREAM), expected)
    arguments.note({})  # the next forward's are its own
    assert arguments.real_tokens(STREAM).all()


@pytest.mark.parametrize("form", ["rows", "layers", "kinds"])
@pytest.mark.parametrize("past", [0, 2])
def test_the_mask_of_all_tokens_so_far(past, form):
    """Of a static cache transformers gives the mask that layers read, with columns to spare."""
    length = 5 - past
    sees = torch.ones(5, 8).tril().bool()[past:] & F.pad(MASK, (0, 3)).bool()[:, None]
    masks = {"rows": MASK, "layers": sees[:, None], "kinds": {"full_attention": sees[:, None]}}
    arguments = ForwardArguments(attention_mask=masks[form], past=past)
    assert torch.equal(arguments.mask_so_far(), MASK)
    stream = torch.zeros(2, length, 4)
    assert torch.equal(arguments.real_tokens(stream), MASK[:, past:].bool())


def test_a_window_that_is_full_ends_with_the_forwards_own_tokens():
    sees = F.pad(SEES[..., :3], (2, 0), value=True)  # two of the six earlier ones, and three new
    arguments = ForwardArguments(attention_mask=sees, past=6)
    assert torch.equal(arguments.real_tokens(STREAM), REAL[:, :3])
    with pytest.raises(RuntimeError, match="use a dynamic cache"):
        arguments.mask_so_far()


def test_a_forward_continues_what_a_cache_holds(make_model, tokens):
    model = make_model()
    ids, _ = tokens([6])
    arguments, found = ForwardArguments(), []

    def note(given):
        arguments.note(given)
        found.append(arguments.continuing)

    observed = ObservedForward(model, note)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    model(ids[:, :4], past_key_values=DynamicCache())
    model(ids[:, 4:], past_key_values=cache)
    model(ids, use_cache=False)
    observed.remove()
    assert found == [False, False, True, False]
