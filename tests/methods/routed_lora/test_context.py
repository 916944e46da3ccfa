"""The control signal's running averages against loops over tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steerlora.methods.routed_lora import context
from steerlora.methods.routed_lora.context import ContextState, average_so_far

AVERAGES = ("causal_mean", "ema")


def slowly(logits, real, name: str, decay: float):
    """Token by token, from the definition."""
    out = torch.zeros_like(logits)
    for row in range(len(logits)):
        seen: list[torch.Tensor] = []
        for t in range(logits.shape[1]):
            if real[row, t]:
                seen.append(logits[row, t])
            if not seen:
                out[row, t] = logits[row, t]
                continue
            ages = range(len(seen) - 1, -1, -1)
            weights = [1.0 if name == "causal_mean" else decay**age for age in ages]
            out[row, t] = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
    return out


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 11, 5, dtype=torch.float64, generator=generator)


REAL = torch.tensor(
    [[1] * 11, [0, 0, 0] + [1] * 8, [1] * 4 + [0] * 7],  # whole, padded left, padded right
    dtype=torch.bool,
)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("chunk", [2, 4, 128])
def test_it_equals_a_loop_over_tokens(logits, name, chunk, monkeypatch):
    monkeypatch.setattr(context, "CHUNK", chunk)
    averages, _ = average_so_far(logits, REAL, name, 0.7)
    torch.testing.assert_close(averages, slowly(logits, REAL, name, 0.7), rtol=1e-12, atol=1e-12)


def test_token_is_the_signal_itself(logits):
    averages, _ = average_so_far(logits, REAL, "token", 0.7)
    assert torch.equal(averages, logits)


@pytest.mark.parametrize("name", AVERAGES)
def test_pieces_with_a_state_equal_the_whole(logits, name):
    whole, _ = average_so_far(logits, REAL, name, 0.7)
    state: ContextState | None = None
    pieces = []
    for part, seen in zip(logits.split([4, 1, 6], 1), REAL.split([4, 1, 6], 1), strict=True):
        piece, state = average_so_far(part, seen, name, 0.7, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", AVERAGES)
def test_gradients(logits, name, monkeypatch):
    monkeypatch.setattr(context, "CHUNK", 3)
    small = logits[:, :7, :2].clone().requires_grad_()
    real = REAL[:, :7]
    assert torch.autograd.gradcheck(lambda x: average_so_far(x, real, name, 0.7)[0], small)


@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_logits_are_the_logits_of_averaged_features(
    name, make_model, make_adapter, tokens
):
    """What lets the average be taken over E + R numbers in place of N latents."""
    model = make_model(torch.float64)
    adapter = make_adapter(model, context=name, decay=0.6)
    sae = adapter.saes[1].double()
    streams = []
    site = adapter.sites[1]
    original = site.signal
    site.signal = lambda stream, real: streams.append(stream) or original(stream, real)
    ids, mask = tokens([9, 6])
    model(input_ids=ids, attention_mask=mask)
    features = sae.encode(streams[0])
    dense = torch.zeros(*ids.shape, sae.latents, dtype=torch.float64)
    dense.scatter_(-1, features.indices, features.values / adapter.scales["1"])
    pooled = slowly(dense, mask.bool(), name, 0.6)
    active = torch.ones(4, dtype=torch.bool)
    averaging, plain = adapter.routers["1"], replace(adapter.config, context="token")
    averaging.config = plain
    expected, _ = averaging(pooled, mask.bool(), active)
    found = adapter.routing()[1]
    real = mask.bool()
    torch.testing.assert_close(found.gate[real], expected.gate[real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mask[real], expected.mask[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("signal", ["sae", "dense"])
def test_generation_with_a_cache_equals_generation_without(
    name, signal, make_model, make_adapter, tokens
):
    model = make_model()
    make_adapter(model, signal, context=name)
    ids, mask = tokens([7, 4, 5])
    ids, mask = ids.flip(1), mask.flip(1)  # padding on the left, as generation has it
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=mask, **chosen)
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **chosen)
    assert torch.equal(cached, uncached)
    for row, seen, together in zip(ids, mask, cached, strict=True):
        alone = model.generate(input_ids=row[seen.bool()][None], **chosen)[0]
        assert torch.equal(alone[-6:], together[-6:])


def test_a_cache_that_the_adapter_has_not_seen_is_refused(make_model, make_adapter, tokens):
    model = make_model()
    ids, mask = tokens([6])
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    make_adapter(model, context="causal_mean")
    with pytest.raises(RuntimeError, match="has not seen"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_no_graph_outlives_its_forward(make_model, make_adapter, tokens):
    model = make_model()
    make_adapter(model, context="ema")
    ids, mask = tokens([6])
    output = model(input_ids=ids, attention_mask=mask)
    kept = output.past_key_values.layers[-1]
    assert output.logits.requires_grad
    assert not kept.together.signal.total.requires_grad
    assert not kept.tokens.signal.values.requires_grad
