"""Routing by the features of every SAE architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.architectures import CASES

from steerlora.saes.base import SparseAutoencoder

WIDTH, LATENTS = 32, 64


@pytest.fixture(params=CASES)
def make_sae(request) -> Callable[..., SparseAutoencoder]:
    """In place of the TopK SAE that ``make_adapter`` builds on elsewhere: as a file would be."""

    def make(seed: int = 0) -> SparseAutoencoder:
        case = CASES[request.param]
        sae = case.make(WIDTH, LATENTS, seed=seed)
        stream = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(seed))
        sae.initialize_thresholds(stream)
        sae.training_errors(case.streams(stream), torch.zeros(LATENTS, dtype=torch.bool))
        return sae.for_inference()

    return make


def test_a_token_s_update_is_its_own_and_trains_the_router(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model)
    ids, mask = tokens([6, 9])
    base = make_model()(ids, attention_mask=mask).logits
    together = model(ids, attention_mask=mask).logits
    active = (adapter.sites[1].features.values > 0).sum(-1)[mask.bool()]
    assert 0 < active.float().mean() < LATENTS / 2
    assert not torch.allclose(together[mask.bool()], base[mask.bool()], atol=1e-3)
    alone = model(ids[:1, :6]).logits
    torch.testing.assert_close(together[:1, :6], alone, atol=1e-5, rtol=0)
    together.square().mean().backward()
    assert adapter.routers["1"].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adapter.sites[1].facts.sae.parameters())


@pytest.mark.parametrize("name", ["replace_random_sae", "replace_dense"])
def test_controls_of_the_signal_run_and_leave_no_trace(name, make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model)
    ids, mask = tokens([6, 9])
    with torch.no_grad():
        intact = model(ids, attention_mask=mask).logits
        with adapter.intervention(name, domain="law", strength=1.0):
            changed = model(ids, attention_mask=mask).logits
        assert changed.isfinite().all()
        assert not torch.allclose(changed[mask.bool()], intact[mask.bool()], atol=1e-3)
        assert torch.equal(model(ids, attention_mask=mask).logits, intact)
