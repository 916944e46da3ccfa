"""Architectures against dense twins: features, losses, gradients; then files and training."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.architectures import CASES, Case, K
from helpers.tensors import largest_tensor_made

from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder, squared_deviation
from steerlora.saes.metrics import sae_metrics
from steerlora.saes.saelens import load_sae, sae_fingerprint, save_sae
from steerlora.saes.skip_transcoder import SkipTranscoder
from steerlora.saes.sparse import sparse_encode
from steerlora.saes.training import SAEModule

WIDTH, LATENTS, TOKENS = 12, 96, 300


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 1 + 3 * torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def made(case: Case, **settings) -> SparseAutoencoder:
    """In float64, with random weights, rows of unit length where they should be."""
    sae = case.make(WIDTH, LATENTS, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_().add_(2)  # a positive number, where half the latents are below
        if sae.unit_norm:
            sae.normalize_decoder()
    return sae


NORMALIZED = {"normalize": "layer_norm", "apply_b_dec_to_input": False}


@pytest.mark.parametrize("settings", [{}, NORMALIZED], ids=["", "layer_norm"])
def test_features_are_the_dense_twin_s(case, settings, x):
    sae = made(case, **{} if case.architecture is SkipTranscoder else settings)
    found = sae.encode(x)
    units = sae.normalized(x).x
    expected = case.features(sae, units)
    torch.testing.assert_close(found.dense(LATENTS), expected)
    assert 0 < (expected > 0).sum() < expected.numel() / 2
    torch.testing.assert_close(sae.decode(found), expected @ sae.W_dec + sae.b_dec)
    few = sae.encode(x.view(2, 3, 50, WIDTH))
    assert few.values.shape[:-1] == (2, 3, 50)
    torch.testing.assert_close(few.dense(LATENTS).view(TOKENS, LATENTS), expected)


def test_features_are_differentiable_in_the_input_and_the_weights(case, x):
    sae = made(case)
    x.requires_grad_()
    weights = {name: p for name, p in sae.named_parameters() if name != "threshold"}
    tensors = [x, *weights.values()]
    sparse = sae.encode(x).values.sin().sum()
    ours = torch.autograd.grad(sparse, tensors, materialize_grads=True)
    dense = case.features(sae, x).sin().sum()
    expected = torch.autograd.grad(dense, tensors, materialize_grads=True)
    for name, mine, theirs in zip(["x", *weights], ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_no_token_and_one_have_features_too(case, x):
    sae = made(case)
    assert sae.encode(x[:0]).values.shape[0] == len(sae(x[:0])) == 0
    torch.testing.assert_close(sae.encode(x[0]).dense(LATENTS), case.features(sae, x[:1])[0])


@pytest.mark.parametrize("dead", ["none", "few", "many"])
def test_the_loss_of_training_and_its_gradients_are_the_dense_twin_s(case, dead, x):
    sae = made(case)
    asleep = torch.zeros(LATENTS, dtype=torch.bool)
    asleep[: {"none": 0, "few": 4, "many": 40}[dead]] = True
    streams = case.streams(x)
    errors = sae.training_errors(streams, asleep)
    ours = errors.error / squared_deviation(sae.written(streams)) + errors.penalty
    expected, features = case.loss(sae, streams, asleep)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(errors.fired, (features > 0).sum(0).double())
    for (name, _), mine, theirs in zip(
        sae.named_parameters(),
        torch.autograd.grad(ours, list(sae.parameters())),
        torch.autograd.grad(expected, list(sae.parameters())),
        strict=True,
    ):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_saved_as_saelens_s_and_loaded_with_equal_features(case, tmp_path):
    normalize = "none" if case.architecture is SkipTranscoder else "layer_norm"
    sae = made(case, normalize=normalize).float()
    save_sae(sae, tmp_path, {})
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == case.saved_as
    loaded = load_sae(tmp_path)
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    assert all(map(torch.equal, loaded.encode(x), sae.encode(x)))
    assert torch.equal(loaded(x), sae(x))
    assert sae_fingerprint(loaded) == sae_fingerprint(sae)
    with torch.no_grad():
        sae.W_enc[0, 0] += 1
    assert sae_fingerprint(loaded) != sae_fingerprint(sae)


@pytest.mark.parametrize(("name", "what"), [("jumprelu l0", "threshold"), ("gated", "b_gate")])
def test_a_file_that_rescales_what_no_decoder_s_norm_is_known_of_is_refused(name, what, tmp_path):
    save_sae(made(CASES[name]), tmp_path, {})
    written = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(written | {"rescale_acts_by_decoder_norm": True}))
    with pytest.raises(UserError, match=f"goes with no .* SAE: .*{what}"):
        load_sae(tmp_path)


def test_its_untrained_twin_has_other_directions_and_the_rest_alike(case):
    sae = made(case)
    twin = sae.untrained_like(seed=9)
    assert type(twin) is type(sae)
    assert twin.settings() == sae.settings()
    for name, parameter in sae.named_parameters():
        if name != "b_enc" or "k" not in case.settings:  # k decides alone how many are active
            same = torch.equal(parameter, twin.get_parameter(name))
            assert same == (name not in ("W_enc", "W_dec", "W_skip")), name


def sparse_data(tokens: int, seed: int = 0) -> torch.Tensor:
    """Tokens that are sums of 2 of 32 directions in 16 dimensions, plus an offset."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    codes = torch.rand(tokens, 32, generator=generator.manual_seed(seed))
    codes = codes * (codes >= codes.topk(2, dim=1).values[:, -1:])
    return 3 + codes @ directions


def trained(case: Case, steps: int, **settings) -> tuple[SparseAutoencoder, dict[str, list[float]]]:
    """After so many steps on sparse data, with the FVU and L0 of each."""
    sae = case.make(16, 64, **({"k": 3} if "k" in case.settings else {"initial_l0": 8}) | settings)
    module = SAEModule(sae, total_steps=steps, lr=5e-3, dead_after_tokens=10 * 256)
    optimizer = module.configure_optimizers()["optimizer"]
    sae.center_on(case.streams(sparse_data(256)))
    sae.initialize_thresholds(sparse_data(256))
    seen: dict[str, list[float]] = {"fvu": [], "l0": []}
    for step in range(steps):
        x = case.streams(sparse_data(256, seed=step))
        sae.begin_step(step / steps)
        losses, fired = module.losses(x)
        losses.total.backward()
        module.count_idle_tokens(fired, len(x))
        optimizer.step()
        optimizer.zero_grad()
        if sae.unit_norm:
            sae.normalize_decoder()
        seen["fvu"].append(losses.fvu.item())
        seen["l0"].append((fired.sum() / len(x)).item())
    return sae.requires_grad_(False), seen


def test_training_explains_sparse_data_and_so_does_what_is_saved(case):
    sae, seen = trained(case, 120)
    assert seen["fvu"][-1] < 0.4 * seen["fvu"][0]
    unseen = case.streams(sparse_data(1000, seed=1000))
    figures = sae_metrics(sae.for_inference(), unseen)
    assert figures["fvu"] < 1.3 * seen["fvu"][-1] + 0.02
    assert figures["l0"] == pytest.approx(seen["l0"][-1], rel=0.2)
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(64), atol=1e-5) == sae.unit_norm


@pytest.mark.parametrize("name", ["jumprelu l0", "jumprelu tanh", "gated"])
def test_a_greater_penalty_leaves_fewer_latents(name):
    key = "l1" if name == "gated" else "sparsity"
    few, many = (trained(CASES[name], 60, **{key: value})[1]["l0"][-1] for value in (1.0, 1e-4))
    assert few < 0.7 * many


@pytest.mark.parametrize("name", ["jumprelu l0", "gated"])
def test_few_latents_are_active_from_the_first_step_on(name):
    first = trained(CASES[name], 1, initial_l0=8)[1]["l0"][0]
    assert first == pytest.approx(8, rel=0.15)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka_topk"])
def test_k_goes_to_its_value_and_stays(name):
    _, seen = trained(CASES[name], 20, initial_k=23, anneal_fraction=0.5, auxiliary=0)
    assert seen["l0"][0] > 15
    assert all(later <= sooner for sooner, later in zip(seen["l0"], seen["l0"][1:11], strict=False))
    assert all(l0 <= 3 for l0 in seen["l0"][10:])


@pytest.mark.parametrize("name", CASES)
def test_a_step_makes_nothing_of_tokens_by_latents_but_a_block_of_pre_activations(
    name, monkeypatch
):
    tokens, width, latents = 3000, 32, 2048
    monkeypatch.setattr("steerlora.saes.sparse._CPU_BLOCK", 1)
    monkeypatch.setattr("steerlora.saes.sparse._LEAST_BLOCK_TOKENS", 128)
    case = CASES[name]
    sae = case.make(width, latents)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.normalize(x, dim=1)  # no token is much busier than others
    sae.initialize_thresholds(x)
    dead = torch.zeros(latents, dtype=torch.bool)

    def step() -> None:
        errors = sae.training_errors(case.streams(x), dead)
        (errors.error + errors.penalty).backward()

    assert largest_tensor_made(step) <= max(128 * latents, tokens * 6 * K) < tokens * latents / 10


@pytest.mark.parametrize("tokens", [0, 1, 128, 1000])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_the_largest_of_a_batch_are_exactly_those(tokens, k, monkeypatch):
    monkeypatch.setattr("steerlora.saes.sparse._CPU_BLOCK", 1)
    monkeypatch.setattr("steerlora.saes.sparse._LEAST_BLOCK_TOKENS", 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 8, generator=generator) * torch.arange(1, tokens + 1)[:, None]
    weight = torch.randn(8, 64, generator=generator)
    bias = torch.randn(64, generator=generator)
    found = sparse_encode(x, weight, bias, torch.zeros(8), None, budget=k * tokens)
    scores = (x @ weight + bias).relu()
    if tokens:
        scores[scores < scores.flatten().topk(k * tokens).values[-1]] = 0
    torch.testing.assert_close(found.dense(64), scores)


def test_the_threshold_follows_the_smallest_value_kept():
    sae = CASES["batch_topk"].make(WIDTH, LATENTS)
    none = torch.zeros(LATENTS, dtype=torch.bool)
    batches = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    smallest = []
    for x in batches:
        scores = (x @ sae.W_enc).relu()
        smallest.append(scores.flatten().topk(K * TOKENS).values[-1])
        sae.training_errors(x, none)
        if len(smallest) == 1:
            torch.testing.assert_close(sae.threshold, smallest[0])
    torch.testing.assert_close(sae.threshold, 0.95 * smallest[0] + 0.05 * smallest[1])
    sae.training_errors(torch.zeros(3, WIDTH), none)  # nothing is active: nothing is learnt
    torch.testing.assert_close(sae.threshold, 0.95 * smallest[0] + 0.05 * smallest[1])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("jumprelu l0", {"penalty": "l1"}, "penalty 'l1': .*l0"),
        ("topk", {"initial_k": LATENTS + 1}, f"1 <= initial_k <= {LATENTS}"),
        ("batch_topk", {"k": 0}, f"a batch_topk SAE of {LATENTS} latents needs 1 <= k"),
        ("skip_transcoder", {"span": 0}, "it needs a span from 1"),
        ("skip_transcoder", NORMALIZED, "it needs a span from 1, none and False"),
        ("matryoshka_topk", {"levels": 8}, "levels is 8: 96 latents have no such prefixes"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        CASES[name].make(WIDTH, LATENTS, **settings)


@pytest.mark.parametrize("normalize", ["none", "layer_norm_input", "layer_norm"])
def test_rescaled_it_is_the_same_sae_of_larger_activations(normalize, case, x):
    if case.architecture is SkipTranscoder and normalize != "none":
        pytest.skip("a skip-transcoder normalises nothing")
    sae = made(case, normalize=normalize)
    features, output = sae.encode(x), sae(x)
    sae.rescale(100.0)
    values = 1.0 if normalize == "layer_norm" else 100.0
    # Layer norm adds an epsilon to the deviation, as large for small activations as for large.
    near = {"atol": 1e-9, "rtol": 1e-6} if normalize == "none" else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(
        sae.encode(100 * x).dense(LATENTS) / values, features.dense(LATENTS), **near
    )
    torch.testing.assert_close(sae(100 * x) / 100, output, **near)
