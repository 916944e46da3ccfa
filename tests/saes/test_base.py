"""SAEs against a dense float64 reference: features, reconstruction, and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tensors import largest_tensor_made

from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.relu import ReLU
from steerlora.saes.sparse import SparseFeatures, sparse_decode, top_k
from steerlora.saes.topk import TopK

WIDTH, LATENTS, K = 12, 96, 5
FEW = -6.0
"""Bias at which a ReLU SAE's features are sparse; at none they are dense."""


def reference_latents(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """Dense ReLU(TopK(.)), in SAELens's words."""
    if sae.normalize != "none":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.std(-1, keepdim=True) + 1e-5)
    x = x - sae.b_dec * sae.apply_b_dec_to_input
    scores = x @ sae.W_enc + sae.b_enc
    if sae.k is not None:
        scores = torch.where(scores >= scores.topk(sae.k).values[..., -1:], scores, 0)
    return scores.relu()


def reference_forward(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    y = reference_latents(sae, x) @ sae.W_dec + sae.b_dec
    if sae.normalize == "layer_norm":
        y = y * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    return y


def make(
    width: int = WIDTH,
    latents: int = LATENTS,
    architecture: type = TopK,
    bias: float = 0.0,
    **settings,
) -> SparseAutoencoder:
    """``bias`` is added to the encoder's: a ReLU SAE then has few active latents."""
    settings = ({"k": K} if architecture is TopK else {}) | settings
    sae = architecture(width, latents, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
        sae.b_enc.add_(bias)
    return sae


SETTINGS = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize": "layer_norm"},
    {"architecture": ReLU},
    {"architecture": ReLU, "bias": FEW},
    {"architecture": ReLU, "normalize": "layer_norm_input"},
    {"normalize": "layer_norm_input"},
    {"architecture": ReLU, "normalize": "layer_norm", "apply_b_dec_to_input": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_features_and_reconstruction_equal_the_dense_reference(settings, rng):
    sae = make(**settings)
    x = 3 * torch.randn(2, 150, WIDTH, generator=rng, dtype=torch.float64)
    features = sae.encode(x)
    torch.testing.assert_close(features.dense(LATENTS), reference_latents(sae, x))
    torch.testing.assert_close(sae(x), reference_forward(sae, x))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_gradient_equals_dense_autograd(settings, rng):
    sae = make(**settings)
    x = 3 * torch.randn(300, WIDTH, generator=rng, dtype=torch.float64)
    x.requires_grad_()
    target = torch.randn(300, WIDTH, generator=rng, dtype=torch.float64)
    tensors = [x, *sae.parameters()]

    def loss(y):
        return (y - target).pow(2).mean()

    ours = loss(sae(x))
    expected = loss(reference_forward(sae, x))
    torch.testing.assert_close(ours, expected)
    for name, mine, theirs in zip(
        ["x", *dict(sae.named_parameters())],
        torch.autograd.grad(ours, tensors),
        torch.autograd.grad(expected, tensors),
        strict=True,
    ):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_gradcheck(settings, rng):
    sae = make(4, 16, **settings | {"k": 2})
    x = torch.randn(3, 4, generator=rng, dtype=torch.float64, requires_grad=True)

    def reconstruct(x, *parameters):
        named = dict(zip(dict(sae.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(sae, named, (x,))

    assert torch.autograd.gradcheck(reconstruct, (x, *sae.parameters()))


def test_unit_row_gradient_is_that_of_a_normalized_decoder(rng):
    sae = make()
    sae.normalize_decoder()
    x = torch.randn(50, WIDTH, generator=rng, dtype=torch.float64)
    features = sae.encode(x).values.detach(), sae.encode(x).indices
    ours = sparse_decode(SparseFeatures(*features), sae.W_dec, unit_rows=True).sin().sum()
    rows = F.normalize(sae.W_dec, dim=1)
    theirs = (SparseFeatures(*features).dense(LATENTS) @ rows).sin().sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, sae.W_dec), torch.autograd.grad(theirs, sae.W_dec)
    )


@pytest.mark.parametrize(("count", "k"), [(96, 5), (1024, 16), (1000, 16), (64, 64), (256, 1)])
def test_top_k_is_exact(count, k, rng):
    scores = torch.randn(200, count, generator=rng)
    found = top_k(scores, k)
    expected = scores.topk(k).values
    assert torch.equal(found.values.sort(descending=True).values, expected)
    assert torch.equal(scores.gather(1, found.indices), found.values)
    assert all(len(set(row)) == k for row in found.indices.tolist())


@pytest.mark.parametrize(("count", "k"), [(1024, 16), (1000, 16)])
def test_ties_keep_exactly_k_distinct_latents_with_the_right_values(count, k, rng):
    scores = torch.randint(-2, 3, (200, count), generator=rng).float()
    found = top_k(scores, k)
    assert torch.equal(found.values.sort(descending=True).values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, found.indices), found.values)
    assert all(len(set(row)) == k for row in found.indices.tolist())
    again = top_k(scores.clone(), k)
    assert torch.equal(found.indices, again.indices)


def test_bfloat16_input_is_encoded_in_float32(rng):
    sae = TopK(WIDTH, LATENTS, k=K)
    x = torch.randn(7, WIDTH, generator=rng).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        features, reconstruction = sae.encode(x), sae(x)
    assert features.values.dtype == reconstruction.dtype == torch.float32
    assert torch.equal(features.values, sae.encode(x.float()).values)
    assert torch.equal(reconstruction, sae(x.float()))


def test_bfloat16_weights_still_compute_in_float32(rng):
    sae = TopK(WIDTH, LATENTS, k=K).bfloat16()
    x = torch.randn(7, WIDTH, generator=rng).bfloat16()
    assert torch.equal(sae(x), sae.float()(x.float()))


@pytest.mark.parametrize("architecture", [TopK, ReLU])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_batch_shapes(batch, architecture, rng):
    sae = make(architecture=architecture)
    x = torch.randn(*batch, WIDTH, generator=rng, dtype=torch.float64)
    features = sae.encode(x)
    active = K if architecture is TopK else features.values.shape[-1]
    assert features.values.shape == features.indices.shape == (*batch, active)
    assert sae.decode(features).shape == sae(x).shape == x.shape
    flat = sae(x.reshape(-1, WIDTH))
    torch.testing.assert_close(sae(x).reshape(-1, WIDTH), flat)


@pytest.mark.parametrize("bias", [0.0, FEW])
def test_relu_features_cover_every_active_latent_whatever_their_number(bias, rng):
    sae = make(architecture=ReLU, bias=bias)
    x = 3 * torch.randn(400, WIDTH, generator=rng, dtype=torch.float64)
    x[200:] *= 0.3  # other blocks, other numbers of active latents
    features = sae.encode(x)
    busiest = (reference_latents(sae, x) > 0).sum(1).max()
    assert features.values.shape[1] == (LATENTS if bias == 0 else busiest)
    torch.testing.assert_close(features.dense(LATENTS), reference_latents(sae, x))


@pytest.mark.parametrize("part", [slice(0, 1), slice(K, K + 1), slice(1, 3)], ids=str)
def test_a_slice_of_the_features_can_be_decoded_and_differentiated(part, rng):
    sae = make()
    x = torch.randn(9, WIDTH, generator=rng, dtype=torch.float64)
    values, indices = sae.positive_latents(x, K, torch.arange(3), 1)
    features = SparseFeatures(values[:, part], indices[:, part])
    expected = features.dense(LATENTS) @ sae.W_dec
    ours = sae.directions(features)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours.sin().sum(), [sae.W_enc, sae.W_dec], retain_graph=True),
        torch.autograd.grad(expected.sin().sum(), [sae.W_enc, sae.W_dec]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_nothing_dense_in_tokens_by_latents_is_saved_for_backward(rng):
    sae = TopK(16, 4096, k=4)
    x = torch.randn(1000, 16, generator=rng, requires_grad=True)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: largest.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        loss = sae(x).pow(2).sum()
    assert max(largest) <= sae.W_dec.numel()
    created = largest_tensor_made(loss.backward)
    assert created <= sae.W_dec.numel() < 1000 * 4096 / 10


def test_gradients_share_the_layout_of_their_parameters(rng):
    sae = TopK(WIDTH, LATENTS, k=K)
    sae(torch.randn(9, WIDTH, generator=rng)).sum().backward()
    for parameter in sae.parameters():
        assert parameter.grad.stride() == parameter.stride()
    assert sae.W_enc.t().is_contiguous()


def test_extra_latents_are_the_best_of_the_given_ones(rng):
    sae = make(apply_b_dec_to_input=False)
    x = torch.randn(300, WIDTH, generator=rng, dtype=torch.float64)
    dead = torch.tensor([3, 40, 41, 77, 95])
    features = sae.positive_latents(x, K, dead, 2)
    extra = SparseFeatures(features.values[:, K:], features.indices[:, K:])
    scores = torch.full((300, LATENTS), -torch.inf, dtype=torch.float64)
    scores[:, dead] = (x @ sae.W_enc + sae.b_enc)[:, dead]
    expected = scores.topk(2)
    torch.testing.assert_close(
        extra.dense(LATENTS),
        torch.zeros_like(scores).scatter(1, expected.indices, expected.values.relu()),
    )
    alone = sae.encode_normalized(x)
    assert torch.equal(alone.values, features.values[:, :K])


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = TopK(WIDTH, LATENTS, k=K, seed=3)
    torch.manual_seed(6)
    same, other = (TopK(WIDTH, LATENTS, k=K, seed=seed) for seed in (3, 4))
    assert torch.equal(first.W_enc, same.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)
    assert torch.equal(first.W_enc, first.W_dec.t())
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(LATENTS))


def test_geometric_median_resists_outliers(rng):
    sae = TopK(WIDTH, LATENTS, k=K)
    x = 2 + 0.1 * torch.randn(500, WIDTH, generator=rng)
    x[:50] += 1000
    sae.center_on(x)
    assert (sae.b_dec - 2).abs().max() < 0.1


@pytest.mark.parametrize("architecture", [TopK, ReLU])
def test_untrained_twin_has_the_shape_and_bias_but_other_directions(architecture):
    sae = make(architecture=architecture, normalize="layer_norm").requires_grad_(False)
    twin = sae.untrained_like(seed=9)
    assert type(twin) is architecture
    assert twin.extra_repr() == sae.extra_repr()
    assert twin.W_enc.dtype == torch.float64
    assert torch.equal(twin.b_dec, sae.b_dec)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    cosine = F.cosine_similarity(twin.W_dec, sae.W_dec).abs().mean()
    assert cosine < 0.4
    assert torch.equal(sae.untrained_like(seed=9).W_enc, twin.W_enc)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "batch"}, "choose from constant_norm_rescale, layer_norm, layer_norm_input"),
        ({"normalize": "layernorm"}, "did you mean 'layer_norm'"),
        ({"k": LATENTS + 1}, f"1 <= k <= {LATENTS}"),
        ({"k": 0}, f"1 <= k <= {LATENTS}"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TopK(WIDTH, LATENTS, **{"k": K} | settings)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
