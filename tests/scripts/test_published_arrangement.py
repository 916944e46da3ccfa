"""The slow arrangement itself, held to loops over tokens, specialists and rank components."""

from __future__ import annotations

import math

import pytest
import torch
from published_arrangement import Controlled, PublishedArrangement, Setting, Signal, dense_features
from torch import nn

from steerlora.lm.decoder import residual_streams

E, R, H, N, D_IN, D_OUT = 3, 4, 6, 20, 7, 5


def controlled(**changes) -> Controlled:
    setting = Setting(**({"specialists": E, "rank": R, "alpha": 6.0, "hidden": H} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Controlled(nn.Linear(D_IN, D_OUT), Signal(), N, setting).double()
        nn.init.normal_(made.B)
        nn.init.normal_(made.rank[2].bias, std=6.0)  # some factors fall below the floor
        nn.init.normal_(made.gate[2].weight)
    return made


def perceptron(layers: nn.Sequential, z: list[float]) -> list[float]:
    """W_2 gelu(W_1 z + b_1) + b_2 in plain numbers."""

    def affine(layer: nn.Linear, x: list[float]) -> list[float]:
        rows, biases = layer.weight.tolist(), layer.bias.tolist()
        pairs = zip(rows, biases, strict=True)
        return [b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in pairs]

    hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in affine(layers[0], z)]
    return affine(layers[2], hidden)


@pytest.mark.parametrize(
    ("top_k", "active"), [(2, None), (3, None), (1, [0, 1, 2]), (2, [0, 2]), (2, [1])]
)
def test_a_linear_layer_is_the_equations_of_the_method(top_k, active):
    layer = controlled(
        top_k=top_k,
        active=None if active is None else torch.isin(torch.arange(E), torch.tensor(active)),
    )
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(1, 5, d, dtype=torch.float64, generator=generator) for d in (D_IN, N))
    layer.signal.z = z
    found = layer(x)[0]
    for t in range(5):
        logits = perceptron(layer.gate, z[0, t].tolist())
        chosen = sorted(active or range(E), key=lambda e: -logits[e])[:top_k]
        total = sum(math.exp(logits[e]) for e in active or range(E))
        softmax = {e: math.exp(logits[e]) / total for e in chosen}
        mask, product = [], 1.0
        for logit in perceptron(layer.rank, z[0, t].tolist()):
            product *= max(1e-4, 1 / (1 + math.exp(-logit)))
            mask.append(product)
        expected = layer.base(x[0, t])
        for e, probability in softmax.items():
            gate = probability / (sum(softmax.values()) + 1e-8)
            for j in range(R):
                inner = (layer.A[e, j] * x[0, t]).sum() * mask[j]
                expected = expected + 6.0 / R * gate * inner * layer.B[e, :, j]
        torch.testing.assert_close(found[t], expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def arranged(make_model, make_sae):
    model = make_model()
    saes = {layer: make_sae(seed=layer) for layer in range(3)}
    scales = {1: 2.5}
    return model, PublishedArrangement(model, saes, Setting(hidden=H), scales)


def test_it_starts_as_the_base_and_trains_only_what_it_added(arranged, make_model, tokens):
    model, arrangement = arranged
    ids, mask = tokens([6, 4])
    arrangement.observe(ids, mask)
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, make_model()(ids, attention_mask=mask).logits)
    assert len(arrangement.controlled) == 3 * 7
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in arrangement.trainable()}
    assert len(trained) == 3 * 7 * (2 + 8)


def test_features_are_the_bases_at_every_layer_even_when_the_model_has_moved(arranged, tokens):
    model, arrangement = arranged
    ids, mask = tokens([6, 4])
    expected = residual_streams(arrangement.base, ids, mask, [1, 2, 3])
    for made in arrangement.controlled.values():
        nn.init.normal_(made.B)
    arrangement.observe(ids, mask)
    model(ids, attention_mask=mask)
    for layer, scale in ((0, 1), (1, 2.5), (2, 1)):
        sae = arrangement.saes[layer]
        stream = expected[layer + 1]  # what the layer gives out
        features = sae.encode(stream)
        dense = torch.zeros(2, 6, sae.latents).scatter(-1, features.indices, features.values)
        torch.testing.assert_close(arrangement.signals[layer].z, dense / scale)
        torch.testing.assert_close(dense, dense_features(sae, stream))
