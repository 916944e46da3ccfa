"""SAE checkpoints: round trip, SAELens's layout and arithmetic, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.formats import open_sae
from steerlora.saes.gated import Gated
from steerlora.saes.relu import ReLU
from steerlora.saes.saelens import load_sae, sae_fingerprint, sae_metadata, save_sae
from steerlora.saes.topk import TopK

WIDTH, LATENTS, K = 6, 20, 3
METADATA = {"model_name": "micro_s", "hook_name": "blocks.2.hook_resid_pre", "context_size": 64}


def make(architecture: type = TopK, **settings) -> SparseAutoencoder:
    settings = ({"k": K} if architecture is TopK else {}) | settings
    sae = architecture(WIDTH, LATENTS, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return sae


def write(directory: Path, config: dict, sae: SparseAutoencoder | None = None) -> Path:
    """A saved SAE whose cfg.json has some keys changed, or removed where the value is None."""
    save_sae(sae or make(), directory, METADATA)
    path = directory / "cfg.json"
    merged = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: v for key, v in merged.items() if v is not None}))
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize": "layer_norm", "apply_b_dec_to_input": False},
        {"architecture": ReLU},
        {"architecture": ReLU, "normalize": "layer_norm_input"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(settings, dtype, tmp_path):
    sae = make(**settings).to(dtype)
    save_sae(sae, tmp_path, METADATA)
    for path in (tmp_path, tmp_path / "sae_weights.safetensors", str(tmp_path)):
        loaded = load_sae(path)
        assert sae_metadata(path) == METADATA
    x = torch.randn(5, WIDTH)
    assert torch.equal(loaded(x), sae(x))
    assert type(loaded) is type(sae)
    assert loaded.extra_repr() == sae.extra_repr()
    assert sae_fingerprint(loaded) == sae_fingerprint(sae)
    assert loaded.W_enc.t().is_contiguous()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_are_saelens_s(tmp_path):
    save_sae(make(), tmp_path, METADATA)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {
        "W_enc": (WIDTH, LATENTS),
        "b_enc": (LATENTS,),
        "W_dec": (LATENTS, WIDTH),
        "b_dec": (WIDTH,),
    }
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "architecture": "topk",
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.0.0", **METADATA},
    }


def test_rescaled_activations_are_folded_exactly(tmp_path):
    stored = make()
    loaded = load_sae(write(tmp_path, {"rescale_acts_by_decoder_norm": True}, stored))
    x = torch.randn(50, WIDTH)
    norm = stored.W_dec.norm(dim=1)
    scores = ((x - stored.b_dec) @ stored.W_enc + stored.b_enc) * norm
    kept = torch.where(scores >= scores.topk(K).values[:, -1:], scores, 0).relu()
    expected = (kept / norm) @ stored.W_dec + stored.b_dec
    features = loaded.encode(x)
    dense = torch.zeros(50, LATENTS).scatter(1, features.indices, features.values)
    torch.testing.assert_close(dense, kept)
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(LATENTS))
    assert not torch.allclose(stored(x), expected)


def test_fingerprint_sees_every_tensor_and_setting_but_not_the_layout():
    reference = sae_fingerprint(make())
    assert sae_fingerprint(make()) == reference
    seen = {reference}
    for name, _ in make().named_parameters():
        changed = make()
        with torch.no_grad():
            changed.get_parameter(name)[0].add_(1e-3)
        seen.add(sae_fingerprint(changed))
    for settings in ({"k": 4}, {"normalize": "layer_norm"}, {"apply_b_dec_to_input": False}):
        seen.add(sae_fingerprint(make(**settings)))
    seen.add(sae_fingerprint(make(ReLU)))
    assert len(seen) == 9
    row_major = make()
    row_major.W_enc = torch.nn.Parameter(row_major.W_enc.detach().contiguous())
    assert sae_fingerprint(row_major) == reference


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architecture": "crosscoder"},
            "architecture 'crosscoder'; choose from batch_topk, gated, .* more",
        ),
        ({"architecture": "top_k"}, "did you mean 'topk'"),
        (
            {"architecture": "relu"},
            "cannot read architecture 'relu'; did you mean",
        ),
        ({"architecture": None}, "lacks architecture"),
        ({"k": None}, "needs k"),
        ({"k": 21}, "1 <= k <= 20"),
        ({"normalize_activations": "layernorm"}, "did you mean 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"d_in": 7}, r"b_dec is \[6\], but cfg.json says \[7\]|W_enc is \[6, 20\].*\[7, 20\]"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_sae(write(tmp_path, config))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected sae_weights"):
        load_sae(tmp_path)
    other = tmp_path / "sae_weight.safetensors"
    other.touch()
    with pytest.raises(UserError, match="did you mean 'sae_weights"):
        load_sae(other)

    directory = write(tmp_path / "sae", {})
    weights = directory / "sae_weights.safetensors"
    complete = weights.read_bytes()
    weights.write_bytes(complete[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        load_sae(directory)
    save_file({"W_enc": torch.zeros(6, 20)}, weights)
    with pytest.raises(UserError, match="holds \\['W_enc'\\]"):
        load_sae(directory)
    (directory / "cfg.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_sae(directory)
    (directory / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"no cfg\.json"):
        load_sae(directory)


def test_a_folder_of_folders_has_one_a_site(tmp_path):
    for site, name in {1: "blocks.1.hook_resid_pre", 3: "blocks.2.hook_resid_post"}.items():
        save_sae(make(seed=site), tmp_path / name, METADATA | {"hook_name": name})
    for site, name in {1: "blocks.1.hook_resid_pre", 3: "blocks.2.hook_resid_post"}.items():
        sae, said = open_sae(str(tmp_path), site)
        assert sae_fingerprint(sae) == sae_fingerprint(make(seed=site))
        assert said["hook_name"] == name
    with pytest.raises(UserError, match=r"no SAE of site 2 in .* it has blocks\.1.*, blocks\.2"):
        open_sae(str(tmp_path), 2)
    _, said = open_sae(str(tmp_path / "blocks.1.hook_resid_pre"), 7)  # whatever its name
    assert said["hook_name"] == "blocks.1.hook_resid_pre"


def test_a_file_says_by_which_version_of_saelens_it_is_read(tmp_path):
    """Without one, SAELens looks for hook and model beside the sizes, where they were before 6."""
    save_sae(make(), tmp_path, METADATA)
    said = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert int(said["sae_lens_version"].split(".")[0]) == 6


# Files of SAELens before version 6


def early(**changes) -> dict:
    """A ``cfg.json`` with the keys that SAELens 5 wrote for an SAE of its training."""
    return {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "model_name": "gpt2-small",
        "hook_name": "blocks.2.hook_resid_pre",
        "hook_layer": 2,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": 64,
        "dataset_path": "text",
        "dtype": "float32",
        "device": "cpu",
        "sae_lens_training_version": "5.0.0",
        "lp_norm": 1.0,
    } | changes


def write_early(directory: Path, sae: SparseAutoencoder, **changes) -> Path:
    save_sae(sae, directory, {})
    (directory / "cfg.json").write_text(json.dumps(early(**changes)))
    return directory


TOP_K = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}


@pytest.mark.parametrize("changes", [TOP_K, {"architecture": "topk", **TOP_K}], ids=str)
def test_an_early_top_k_is_read_as_one(changes, tmp_path):
    stored = make()
    loaded = load_sae(write_early(tmp_path, stored, **changes))
    assert (type(loaded), loaded.k) == (TopK, K)
    x = torch.randn(50, WIDTH)
    assert torch.equal(loaded(x), stored(x))
    assert sae_metadata(tmp_path)["hook_name"] == "blocks.2.hook_resid_pre"
    assert sae_metadata(tmp_path)["prepend_bos"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": None, "activation_fn_str": None, "normalize_activations": None},
        {"hook_name": None, "hook_point": "blocks.2.hook_resid_pre", "use_ghost_grads": False},
    ],
    ids=str,
)
def test_an_early_relu_is_read_as_one(changes, tmp_path):
    stored = make(ReLU)
    kept = {key: value for key, value in early(**changes).items() if value is not None}
    save_sae(stored, tmp_path, {})
    (tmp_path / "cfg.json").write_text(json.dumps(kept))
    loaded = load_sae(tmp_path)
    assert type(loaded) is ReLU
    x = torch.randn(5, WIDTH)
    assert torch.equal(loaded(x), stored(x))
    assert sae_metadata(tmp_path)["hook_name"] == "blocks.2.hook_resid_pre"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu', only relu, topk"),
        ({"activation_fn_str": "topk"}, "needs k"),
        ({"activation_fn_kwargs": {"k": K}}, "k=3 goes with no standard SAE"),
        (TOP_K | {"k": 4}, "k is 4, and 3 in activation_fn_kwargs"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1, "sign": -1}},
            "only k is known",
        ),
        ({"architecture": "crosscoder"}, "cannot read architecture 'crosscoder'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is set"),
        ({"hook_head_index": 0}, "reads one attention head"),
        ({"normalize_activations": True}, "expected_average_only_in, so norm_scaling_factor is"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is no: true or false"),
        ({"features_to_zero": [1]}, "features_to_zero may change the features"),
    ],
)
def test_an_early_file_of_other_features_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load_sae(write_early(tmp_path, make(ReLU), **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(name, value, tmp_path):
    sae = make()
    with torch.no_grad():
        sae.get_parameter(name)[-1] = value
    save_sae(sae, tmp_path, METADATA)
    with pytest.raises(UserError, match=rf"values of {name} are NaN or infinite"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_sae": 10**12}, "b_enc is"),
        ({"d_in": "6"}, "b_dec is"),
        ({"k": "3"}, "cfg.json"),
        ({"metadata": ["a"]}, "metadata should be"),
        ({"metadata": {"sae_lens_version": "new"}}, "a version such as"),
        ({"decoder_scale": 2.0}, "decoder_scale may change the features"),
    ],
)
def test_nonsense_is_one_line(config, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load_sae(write(tmp_path, config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", [TopK, Gated])
@pytest.mark.parametrize("size", [None, "20", 10**12, 0, -20, 2.5])
def test_a_number_of_latents_that_is_none_is_one_line(architecture, size, tmp_path):
    save_sae(make(architecture), tmp_path, METADATA)
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"d_sae": size}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"but cfg\.json says"):
        load_sae(tmp_path)


# Files that normalise activations


def test_a_constant_norm_is_given_to_every_token_and_taken_back(tmp_path):
    stored = make()
    loaded = load_sae(write(tmp_path, {"normalize_activations": "constant_norm_rescale"}, stored))
    x = torch.randn(50, WIDTH)
    x[-1] = 0
    norm = x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(loaded(x[:-1]), (stored(x / norm * WIDTH**0.5) * norm)[:-1] / 6**0.5)
    assert torch.equal(loaded(x)[-1], torch.zeros(WIDTH))


@pytest.mark.parametrize("rescaled", [False, True])
def test_an_expected_norm_is_folded_into_the_weights(rescaled, tmp_path):
    """By the file's factor, or by the activations that it is to read."""
    stored = make()
    expected = {
        "normalize_activations": "expected_average_only_in",
        "rescale_acts_by_decoder_norm": rescaled,
    }
    folder = write(tmp_path, expected, stored)
    x = 3 * torch.randn(50, WIDTH)
    scale = WIDTH**0.5 / 7.0
    scaled = load_sae(write(tmp_path / "plain", expected | {"normalize_activations": "none"}))
    for said in ({}, {"norm_scaling_factor": scale}):
        write(tmp_path, expected | {"metadata": METADATA | said}, stored)
        loaded = load_sae(folder, mean_norm=None if said else lambda: 7.0)
        torch.testing.assert_close(loaded(x), scaled(scale * x) / scale)
        assert loaded.normalize == "none"
        if not rescaled:
            torch.testing.assert_close(loaded.encode(x).values, scaled.encode(scale * x).values)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (None, "norm_scaling_factor is needed"),
        (0, "norm_scaling_factor is 0: a number above 0"),
        ("3", "norm_scaling_factor is 3: a number above 0"),
    ],
)
def test_an_expected_norm_without_a_factor_is_refused(factor, message, tmp_path):
    changes = {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": factor}
    with pytest.raises(UserError, match=message):
        load_sae(write(tmp_path, changes))
