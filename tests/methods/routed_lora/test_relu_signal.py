"""Routing by a ReLU SAE, where every token has a number of active latents of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.features import taxonomy

from steerlora.lm.decoder import decoder_of, residual_streams
from steerlora.methods.interventions import INTERVENTIONS
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora import losses
from steerlora.methods.routed_lora.interventions import SiteFacts
from steerlora.saes.relu import ReLU
from steerlora.saes.sparse import SparseFeatures

WIDTH, LATENTS = 32, 64


@pytest.fixture(params=[-1.8, -0.8], ids=["sparse", "dense"])
def bias(request) -> float:
    """Mean of the encoder's bias, at which few or many latents are active."""
    return request.param


@pytest.fixture
def make_sae(bias) -> Callable[..., ReLU]:
    """In place of the TopK SAE that ``make_adapter`` builds on elsewhere."""

    def make(seed: int = 0, width: int = WIDTH) -> ReLU:
        sae = ReLU(width, LATENTS, normalize="layer_norm", seed=seed)
        with torch.no_grad():
            sae.b_enc.normal_(bias, 0.5, generator=torch.Generator().manual_seed(seed))
        return sae

    return make


def dense(features: SparseFeatures) -> torch.Tensor:
    zeros = torch.zeros(*features.values.shape[:-1], LATENTS)
    return zeros.scatter_add(-1, features.indices, features.values)


def test_neither_batch_mates_nor_padding_nor_a_cache_change_a_token(
    make_model, make_adapter, tokens, bias
):
    model = make_model()
    adapter = make_adapter(model)
    ids, mask = tokens([6, 9])
    together = model(ids, attention_mask=mask).logits[:1, :6]
    active = (adapter.sites[1].features.values > 0).sum(-1)
    entries = adapter.sites[1].features.values.shape[-1]
    assert active[mask.bool()].min() < active.max()
    assert entries == (active.max() if bias < -1 else LATENTS)
    alone = model(ids[:1, :6])
    torch.testing.assert_close(together, alone.logits, atol=1e-5, rtol=0)
    cache = model(ids[:1, :5], use_cache=True).past_key_values
    step = model(ids[:1, 5:6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(step[:, 0], alone.logits[:, 5], atol=1e-5, rtol=0)


def test_every_loss_trains_the_adapter_and_equals_its_dense_formula(
    make_model, make_adapter, make_sae, tokens, bias
):
    model = make_model()
    adapter = make_adapter(model)
    monitor = Monitor(model, adapter, make_sae(seed=7), 3, taxonomy(LATENTS))
    general, own, prototypes = monitor.general, monitor.domain, monitor.prototypes
    ids, mask = tokens([5, 8, 3])
    with monitor.recording():
        decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    adapted, base = monitor.features(), monitor.base_features()
    assert bias > -1 or adapted.values.shape != base.values.shape
    preservation = losses.preservation(adapted, base, general)
    expected = ((dense(adapted) - dense(base)) * general).square().mean()
    torch.testing.assert_close(preservation, expected)
    domains = torch.arange(len(adapted.values)) % 2
    steering = losses.steering(adapted, prototypes, own, domains)
    expected = ((dense(adapted) - prototypes[domains]) * own[domains]).square().mean()
    torch.testing.assert_close(steering, expected)
    (preservation + steering).backward()
    assert adapter.routers["1"].weight.grad.abs().sum() > 0
    assert all(layer.B.grad.abs().sum() > 0 for layer in adapter.layers.values())


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_intervention_runs_and_leaves_no_trace(
    name, strength, make_model, make_adapter, tokens
):
    model = make_model()
    adapter = make_adapter(model)
    adapter.sites[1].facts.mean_rank = 1.4
    adapter.sites[1].facts.specialist_of_domain = {"law": 2}
    ids, mask = tokens([6, 9])
    intact = model(ids, attention_mask=mask).logits
    found = []
    for _ in range(2):
        with adapter.intervention(name, domain="law", strength=strength):
            found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert torch.equal(*found)
    assert found[0].isfinite().all()
    assert not torch.allclose(found[0], intact[mask.bool()], atol=1e-3)
    assert torch.equal(model(ids, attention_mask=mask).logits, intact)


def test_a_dense_signal_has_as_many_entries_as_each_token_had_latents(make_model, make_sae, tokens):
    sae, (ids, mask) = make_sae(), tokens([6, 9])
    facts = SiteFacts(sae, 2.4, {})

    def replaced(stream, real) -> torch.Tensor:
        features = sae.encode(stream)
        control = INTERVENTIONS["replace_dense"](seed=0)
        found = dense(control.features(features, stream, real, facts))
        assert torch.equal((found != 0).sum(-1), (features.values > 0).sum(-1))
        torch.testing.assert_close(found.norm(dim=-1), features.values.norm(dim=-1))
        return found

    with torch.no_grad():
        stream = residual_streams(make_model(), ids, mask, [1])[1]
        whole = replaced(stream, mask.bool())
        # A token's own, whatever the busiest one beside it has.
        torch.testing.assert_close(replaced(stream[:1, :2], mask[:1, :2].bool()), whole[:1, :2])
