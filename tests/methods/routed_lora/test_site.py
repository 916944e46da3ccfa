"""Where sites read, what they leave out: base streams, a router a module, hard rank, packing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from steerlora.lm.decoder import residual_streams
from steerlora.methods.routed_lora.config import CONTEXTS


def logits(model, ids, mask, **inputs):
    return model(input_ids=ids, attention_mask=mask, **inputs).logits


@pytest.mark.parametrize("signal", ["none", "dense", "sae"])
def test_disabled_is_the_base_model_to_the_bit(signal, make_model, make_adapter, tokens):
    ids, mask = tokens([8, 5])
    model = make_model()
    base = logits(model, ids, mask)
    adapter = make_adapter(model, signal)
    adapted = logits(model, ids, mask)
    with adapter.disabled():
        assert torch.equal(logits(model, ids, mask), base)
    assert torch.equal(logits(model, ids, mask), adapted)
    assert not torch.equal(adapted, base)


def recorded_streams(adapter) -> dict[int, torch.Tensor]:
    """What each site's router reads from now on."""
    seen: dict[int, torch.Tensor] = {}
    for layer, site in adapter.sites.items():
        original = site.signal

        def signal(stream, real, layer=layer, original=original):
            seen[layer] = stream
            return original(stream, real)

        site.signal = signal
    return seen


def test_source_base_reads_the_base_models_streams_at_every_site(make_model, make_adapter, tokens):
    ids, mask = tokens([8, 5])
    base = residual_streams(make_model(), ids, mask, [0, 1, 2])
    for source, equal in (("base", [True] * 3), ("inline", [True, False, False])):
        model = make_model()
        seen = recorded_streams(make_adapter(model, sites=(0, 1, 2), source=source))
        logits(model, ids, mask)
        assert [torch.equal(seen[site], base[site]) for site in (0, 1, 2)] == equal


def test_source_base_with_one_site_needs_no_second_forward(make_model, make_adapter, tokens):
    ids, mask = tokens([8, 5])
    outputs = []
    for source in ("inline", "base"):
        model = make_model()
        adapter = make_adapter(model, source=source)
        outputs.append(logits(model, ids, mask))
        assert not adapter.forward_state.base_streams
    assert torch.equal(*outputs)


def test_source_base_last_reads_the_bases_final_hidden_state(make_model, make_adapter, tokens):
    ids, mask = tokens([8, 5])
    final = make_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
    model = make_model()
    seen = recorded_streams(
        make_adapter(model, "dense", sites=(0, 2), source="base_last", dynamic_rank=False)
    )
    logits(model, ids, mask)
    assert torch.equal(seen[0], final)
    assert torch.equal(seen[2], final)


def test_an_sae_cannot_read_the_final_hidden_state(make_model, make_adapter):
    with pytest.raises(ValueError, match="base_last"):
        make_adapter(make_model(), "sae", source="base_last")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("signal", "source"), [("sae", "base"), ("dense", "base"), ("dense", "base_last")]
)
def test_a_second_forward_has_a_cache_of_its_own(
    context, signal, source, make_model, make_adapter, tokens
):
    model = make_model()
    make_adapter(model, signal, sites=(0, 2), source=source, context=context)
    ids, mask = tokens([7, 4, 5])
    ids, mask = ids.flip(1), mask.flip(1)
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=mask, **chosen)
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **chosen)
    assert torch.equal(cached, uncached)
    again = model.generate(input_ids=ids, attention_mask=mask, **chosen)
    assert torch.equal(cached, again)  # nothing is left of the first


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_a_router_a_module_weighs_its_own_module(router, make_model, make_adapter, tokens):
    """Changing one module's router changes that module's scale and no other."""
    ids, mask = tokens([6])
    model = make_model()
    adapter = make_adapter(model, router=router, router_hidden=6, per_module=True)
    logits(model, ids, mask)
    site = adapter.sites[1]
    before = [scale.clone() for scale in site.found.scales]
    names = adapter.modules_of(1)
    assert len(before) == len(names) == 14
    routed = adapter.routers["1"]
    with torch.no_grad():
        if router == "mlp":
            routed.rank_bias[3] += 1
        else:
            routed.bias.view(14, -1)[3, 4:] += 1
    logits(model, ids, mask)
    changed = [not torch.equal(a, b) for a, b in zip(before, site.found.scales, strict=True)]
    assert changed == [index == 3 for index in range(14)]
    found = adapter.routing()[1]
    assert found.gate.shape == (1, 6, 4)
    torch.testing.assert_close(found.mask, site.routing.mask.mean(-2))


@pytest.mark.parametrize("per_module", [False, True])
def test_hard_rank_truncates_and_saves_the_work(per_module, make_model, make_adapter, tokens):
    ids, mask = tokens([8, 5])
    settings = {"rank": 8, "alpha": 8.0, "per_module": per_module}
    model = make_model()
    adapter = make_adapter(model, **settings)
    with torch.no_grad():
        soft = logits(model, ids, mask)
        with FlopCounterMode(display=False) as before:
            logits(model, ids, mask)
    threshold = float(adapter.sites[1].routing.mask.quantile(0.5))
    model = make_model()
    adapter = make_adapter(model, hard_rank=threshold, **settings)
    with torch.no_grad(), FlopCounterMode(display=False) as after:
        hard = logits(model, ids, mask)
    site = adapter.sites[1]
    assert after.get_total_flops() < before.get_total_flops()
    assert sum(map(len, site.found.columns)) < 4 * 8 * len(site.found.columns)
    kept = site.routing.mask
    assert ((kept == 0) | (kept >= threshold)).all()
    assert (kept == 0).any()
    assert not torch.equal(hard, soft)
    trained = logits(model, ids, mask)  # a gradient is recorded: the soft mask
    torch.testing.assert_close(trained, soft, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("signal", ["sae", "dense"])
def test_packed_samples_are_routed_as_if_alone(context, signal, make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model, signal, context=context)
    samples = [tokens([length], seed=length)[0] for length in (7, 4, 5)]
    alone = []
    for ids in samples:
        model(input_ids=ids)
        alone.append(adapter.routing()[1])
    packed = torch.cat(samples, 1)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in samples])[None]
    out = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    together = adapter.routing()[1]
    for part in ("gate", "mask"):
        expected = torch.cat([getattr(routing, part) for routing in alone], 1)
        torch.testing.assert_close(getattr(together, part), expected, atol=1e-5, rtol=1e-4)
    expected = torch.cat([model(input_ids=ids).logits for ids in samples], 1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
