"""Sites that read what leaves their layer: the base's stream, with and without a KV cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from steerlora.lm.decoder import residual_streams

PUBLISHED = {"source": "base", "reads": "output", "per_module": True, "router": "mlp"}


@pytest.mark.parametrize("sites", [(0, 1, 2), (1,), (2,)])
def test_features_are_those_of_what_leaves_the_base_s_layer(
    make_model, make_adapter, tokens, sites
):
    """Also with one site, whose own layer is adapted."""
    model = make_model()
    adapter = make_adapter(model, sites=sites, router_hidden=5, **PUBLISHED)
    assert adapter.config.streams == [site + 1 for site in sites]
    ids, mask = tokens([7, 4])
    model(input_ids=ids, attention_mask=mask)
    streams = residual_streams(make_model(), ids, mask, [site + 1 for site in sites])
    for site in sites:
        expected = adapter.saes[site].encode(streams[site + 1])
        found = adapter.sites[site].features
        real = mask.bool()
        assert torch.equal(found.indices[real], expected.indices[real])
        torch.testing.assert_close(found.values[real] * 2.5, expected.values[real])


def test_tokens_of_a_cache_are_routed_as_without_one(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model, sites=(0, 1, 2), router_hidden=5, **PUBLISHED)
    ids, _ = tokens([8, 8])
    whole = model(ids, use_cache=False).logits
    gates = adapter.routing()[2].gate
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    for position in range(5, 8):
        found = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(found.logits[:, 0], whole[:, position], atol=1e-4, rtol=0)
        gate = adapter.routing()[2].gate[:, 0]
        torch.testing.assert_close(gate, gates[:, position], atol=1e-5, rtol=0)
