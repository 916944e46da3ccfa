"""The monitor: the base's features to the bit, the adapted ones with gradient, no trace left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.features import taxonomy
from transformers import Qwen3ForCausalLM

from steerlora.lm.decoder import EditedLayer, decoder_of, residual_streams
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora import losses
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.saes.sparse import SparseFeatures

LAYERS, LATENTS = 3, 64  # of the fixtures' model and SAE
LENGTHS = [5, 8, 3]


@pytest.fixture
def made(make_model, make_adapter, make_sae):
    """``made(layer=L, signal=..., sites=(1,), **shape)``: model, attached adapter, monitor."""

    def make(layer: int = LAYERS, **changes):
        model = make_model()
        adapter = make_adapter(model, **changes)
        return model, adapter, Monitor(model, adapter, make_sae(seed=7), layer, taxonomy())

    return make


def forward(model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, **more) -> torch.Tensor:
    return decoder_of(model)(
        input_ids=ids, attention_mask=mask, use_cache=False, **more
    ).last_hidden_state


def expected_features(model, sae, ids, mask, layer: int) -> SparseFeatures:
    return sae.encode(residual_streams(model, ids, mask, [layer])[layer][mask.bool()])


def equal(one: SparseFeatures, other: SparseFeatures) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


CASES = [
    {"layer": 2},
    {"layer": 3},
    {"layer": 2, "sites": (0, 2)},
    {"layer": 3, "sites": (0, 1), "source": "base"},
    {"layer": 2, "signal": "dense"},
    {"layer": 3, "signal": "dense", "source": "base_last", "dynamic_rank": False},
    {"layer": 3, "signal": "none"},
    {"layer": 3, "per_module": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_base_features_are_the_base_s_to_the_bit(made, make_model, tokens, case):
    model, adapter, monitor = made(**case)
    ids, mask = tokens(LENGTHS)
    with monitor.recording():
        adapted = forward(model, ids, mask)
    before = [site.routing for site in adapter.sites.values()]
    base = monitor.base_features()
    assert equal(base, expected_features(make_model(), monitor.sae, ids, mask, case["layer"]))
    assert not base.values.requires_grad
    # Reading them changes nothing of the forward that was recorded, nor of the next.
    assert all(a is b.routing for a, b in zip(before, adapter.sites.values(), strict=True))
    assert torch.equal(adapted, forward(model, ids, mask))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_features_are_those_of_the_adapted_stream(made, tokens, case):
    model, _, monitor = made(**case)
    ids, mask = tokens(LENGTHS)
    with monitor.recording():
        forward(model, ids, mask)
    features = monitor.features()
    assert len(features.values) == sum(LENGTHS)
    assert equal(features, monitor.sae.encode(seen(model, case["layer"], ids, mask)[mask.bool()]))
    assert losses.squared_change(features, monitor.base_features(), monitor.general) > 0


def seen(model, layer: int, ids: torch.Tensor, mask: torch.Tensor, **more) -> torch.Tensor:
    """The stream entering ``layer`` in a forward of the model as it stands, [B, S, D]."""
    decoder, streams = decoder_of(model), []
    reader = decoder.norm if layer == LAYERS else decoder.layers[layer]
    hook = reader.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    forward(model, ids, mask, **more)
    hook.remove()
    return streams[-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_left_behind(made, tokens, case):
    model, adapter, monitor = made(**case)
    ids, mask = tokens(LENGTHS)
    modules, names = list(model.modules()), list(model.state_dict())
    plain = forward(model, ids, mask)
    with monitor.recording():
        recorded = forward(model, ids, mask)
    assert torch.equal(plain, recorded)
    with pytest.raises(RuntimeError, match="stop"), monitor.recording():
        raise RuntimeError("stop")
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert names == list(model.state_dict())
    adapter.remove()
    assert not any(isinstance(module, EditedLayer) for module in model.modules())


def test_losses_reach_the_adapter_through_the_monitor_and_the_sae_stays(made, tokens):
    model, adapter, monitor = made()
    ids, mask = tokens(LENGTHS)
    with monitor.recording():
        forward(model, ids, mask)
    adapted = monitor.features()
    loss = losses.preservation(adapted, monitor.base_features(), monitor.general)
    loss.backward()
    assert all(layer.A.grad.abs().sum() > 0 for layer in adapter.layers.values())
    assert all(layer.B.grad.abs().sum() > 0 for layer in adapter.layers.values())
    assert adapter.routers["1"].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in monitor.sae.parameters())


def test_an_adapter_that_does_nothing_yet_is_preserved_exactly(made, tokens):
    model, adapter, monitor = made()
    for layer in adapter.layers.values():
        torch.nn.init.zeros_(layer.B)
    ids, mask = tokens(LENGTHS)
    with monitor.recording():
        forward(model, ids, mask)
    adapted, base = monitor.features(), monitor.base_features()
    assert losses.preservation(adapted, base, monitor.general) == 0
    assert monitor.drift(ids, mask)[0] == 0


def test_padding_on_either_side_and_the_order_of_rows_change_nothing(made, tokens):
    _, _, monitor = made()
    ids, mask = tokens(LENGTHS)
    change, norm = monitor.drift(ids, mask)
    assert change > 0
    order = torch.tensor([2, 0, 1])
    for sides in ((0, 4), (4, 0)):
        wider, real = F.pad(ids[order], sides, value=9), F.pad(mask[order], sides)
        again = monitor.drift(wider, real)
        torch.testing.assert_close(again, (change, norm), rtol=1e-4, atol=0)
    alone = [monitor.drift(ids[[row], :n], mask[[row], :n]) for row, n in enumerate(LENGTHS)]
    sums = tuple(sum(parts) for parts in zip(*alone, strict=True))
    torch.testing.assert_close(sums, (change, norm), rtol=1e-4, atol=0)


def test_drift_is_the_dense_ratio(made, make_model, tokens):
    model, _, monitor = made(layer=2)
    ids, mask = tokens(LENGTHS)
    change, norm = monitor.drift(ids, mask)
    with monitor.recording():
        forward(model, ids, mask)
    dense = [
        torch.zeros(sum(LENGTHS), LATENTS).scatter_add(1, found.indices, found.values)
        for found in (
            monitor.features(),
            expected_features(make_model(), monitor.sae, ids, mask, 2),
        )
    ]
    general = monitor.general
    expected = ((dense[0] - dense[1]) * general).square().sum()
    torch.testing.assert_close(change, expected)
    torch.testing.assert_close(norm, (dense[1] * general).square().sum())
    assert not change.requires_grad


def test_packed_rows_keep_their_positions(made, make_model, tokens):
    model, _, monitor = made()
    ids, mask = tokens([8, 8])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, 8)
    with monitor.recording():
        forward(model, ids, mask, position_ids=positions)
    stream = seen(make_model(), LAYERS, ids, mask, position_ids=positions)
    assert equal(monitor.base_features(), monitor.sae.encode(stream[mask.bool()]))


@pytest.mark.parametrize("layer", [0, 1, LAYERS + 1])
def test_a_site_that_no_adapter_lies_below_is_refused(made, layer):
    with pytest.raises(ValueError, match=r"choose from 2 .* to 3"):
        made(layer=layer)


def test_what_does_not_fit_is_refused(make_model, make_adapter, make_sae):
    model = make_model()
    adapter: Adapter = make_adapter(model)
    with pytest.raises(ValueError, match="reads width 16, the model has 32"):
        Monitor(model, adapter, make_sae(width=16), 2, taxonomy())
    with pytest.raises(ValueError, match="has 64 latents, its taxonomy 48"):
        Monitor(model, adapter, make_sae(), 2, taxonomy(48))
