"""SAEs of other libraries and publishers: their arithmetic, their sites, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.sae_files import LATENTS, LAYER, WIDTH, WRITTEN, gemma_scope, normal

from steerlora.errors import UserError
from steerlora.saes import formats, places
from steerlora.saes.formats import hub_files, open_sae, sae_files, site_of
from steerlora.saes.saelens import load_sae, sae_fingerprint, save_sae

EVERY = pytest.mark.parametrize("name", WRITTEN)
WITH_CONFIG = [name for name, one in WRITTEN.items() if one.config]


def refused(path: Path | str, site: int = LAYER + 1) -> str:
    """The one line that an SAE is refused with."""
    with pytest.raises(UserError) as error:
        open_sae(str(path), site)
    assert "\n" not in str(error.value)
    return str(error.value)


@EVERY
def test_features_and_reconstruction_are_the_library_s(name, tmp_path):
    written = WRITTEN[name]
    sae, said = open_sae(str(written.save(tmp_path)), LAYER + 1)
    assert site_of(said["hook_name"]) == LAYER + 1
    x = normal(200, WIDTH, seed=9)
    features = sae.encode(x)
    dense = torch.zeros(len(x), LATENTS).scatter_add(1, features.indices, features.values)
    expected = written.encode(x)
    assert 0 < (expected > 0).sum() < expected.numel()
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), written.decode(expected, x), rtol=1e-5, atol=2e-5)
    assert not sae.training
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    save_sae(sae, tmp_path / "ours", said)
    assert sae_fingerprint(load_sae(tmp_path / "ours")) == sae_fingerprint(sae)


@EVERY
def test_an_sae_is_found_by_file_by_folder_and_by_the_folder_of_all(name, tmp_path):
    written = WRITTEN[name]
    path = written.save(tmp_path) / written.weights
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    fingerprints = set()
    for place in (tmp_path, folder, path):
        fingerprints.add(sae_fingerprint(open_sae(str(place), LAYER + 1).sae))
        files = sae_files(str(place), LAYER + 1)
        assert {file.resolve() for file in files.values()} == {
            path.resolve(),
            *((tmp_path / written.config[0]).resolve() for _ in range(bool(written.config))),
        }
    assert len(fingerprints) == 1


@EVERY
def test_a_tensor_that_is_absent_transposed_not_finite_or_whole_is_refused_by_name(name, tmp_path):
    written = WRITTEN[name]
    unused = ("k", "group_sizes") + (("threshold",) if name == "AutoEncoderTopK" else ())
    for part, tensor in written.tensors.items():
        if part in unused:
            continue
        others = {key: value for key, value in written.tensors.items() if key != part}
        assert f"lacks {part}: it holds" in refused(written.save(tmp_path, others))
        if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
            flipped = written.save(tmp_path, others | {part: tensor.t().contiguous()})
            wrong, right = list(tensor.t().shape), list(tensor.shape)
            told = refused(flipped)
            assert f"{part} is {wrong}" in told
            assert f"it must be {right}" in told
        for value in (torch.nan, torch.inf):
            spoilt = tensor.clone(memory_format=torch.contiguous_format)
            spoilt.view(-1)[-1] = value
            told = refused(written.save(tmp_path, others | {part: spoilt}))
            assert f"values of {part} are NaN or infinite" in told
        whole = written.save(tmp_path, others | {part: tensor.to(torch.int64)})
        assert f"{part} is torch.int64, not floating-point" in refused(whole)


@EVERY
def test_files_cut_short_are_refused(name, tmp_path):
    written = WRITTEN[name]
    file = written.save(tmp_path) / written.weights
    complete = file.read_bytes()
    for content in (complete[: len(complete) // 2], b"", b"no tensors"):
        file.write_bytes(content)
        assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_configuration_that_is_no_object_or_absent_is_refused(name, tmp_path):
    written = WRITTEN[name]
    config = written.save(tmp_path) / written.config[0]
    config.write_text("[1]")
    assert "should hold a JSON object" in refused(tmp_path)
    config.write_text("{")
    assert "is not JSON" in refused(tmp_path)
    config.unlink()
    if name != "Gemma Scope 2":  # not all of its have one
        assert f"has no {config.name}" in refused(tmp_path)


def test_pickled_objects_are_not_loaded(tmp_path):
    for name in ("AutoEncoderTopK", "Qwen-Scope"):
        written = WRITTEN[name]
        file = written.save(tmp_path / name) / written.weights
        torch.save({"W_enc": Path("an object")}, file)
        assert "cannot be read" in refused(tmp_path / name)
        torch.save([1], file)
        assert "it holds list" in refused(tmp_path / name)


TRAINER = WRITTEN["AutoEncoderTopK"].config[1]["trainer"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sparsify", {"k": "3"}, 'k is "3": a whole number from 1'),
        ("sparsify", {"k": LATENTS + 1}, "1 <= k <= 20"),
        ("sparsify", {"d_in": None}, "d_in is null"),
        ("sparsify", {"d_in": WIDTH + 1}, "says 20 of 7"),
        ("sparsify", {"num_latents": 0}, "says 192 of 6"),
        ("sparsify", {"activation": "groupmax"}, "cannot read activation 'groupmax'"),
        ("sparsify", {"signed": True}, "cannot read activation 'signed'"),
        ("sparsify", {"skip_connection": True}, "goes with no SAE"),
        ("AutoEncoderTopK", {"trainer": TRAINER | {"k": "3"}}, 'k is "3"'),
        ("AutoEncoderTopK", {"trainer": TRAINER | {"k": 4}}, "k is 3, but 4 in config.json"),
        ("AutoEncoderTopK", {"trainer": TRAINER | {"dict_size": 9}}, "dict_size 20, but"),
        ("AutoEncoderTopK", {"trainer": TRAINER | {"layer": None}}, "layer is null"),
        ("AutoEncoderTopK", {"trainer": [1]}, "should be JSON objects"),
        ("AutoEncoderTopK", {"trainer": TRAINER | {"dict_class": "AutoEncoderTopk"}}, "did you"),
        ("Gemma Scope 2", {"architecture": "topk"}, "cannot read architecture 'topk'"),
        ("Gemma Scope 2", {"hf_hook_point_out": "model.layers.8.mlp"}, "is a transcoder"),
        ("Llama Scope", {"hook_point_out": "blocks.8.hook_mlp_out"}, "a transcoder from"),
        ("Llama Scope", {"hook_point_in": None}, "hook_point_in is None"),
        ("Llama Scope", {"jump_relu_threshold": "0.3"}, "jump_relu_threshold is 0.3: a number"),
        ("Llama Scope", {"dataset_average_activation_norm": {"in": 0}}, "norm.in is 0: a number"),
        ("Llama Scope", {"d_sae": 9}, "says d_sae 9"),
    ],
)
def test_a_configuration_of_other_features_is_refused(name, changes, message, tmp_path):
    assert message in refused(WRITTEN[name].save(tmp_path, **changes))


def test_the_backup_of_a_training_is_no_sae(tmp_path):
    written = WRITTEN["AutoEncoderTopK"]
    backup = {"step": 5, "ae": written.tensors, "optimizer": {}, "config": {}, "norm_factor": 2.0}
    assert "a training that has not ended" in refused(written.save(tmp_path, backup))


# Which stream


@pytest.mark.parametrize(
    ("name", "changes", "hook"),
    [
        ("BatchTopKSAE", {"submodule_name": "mlp_out_layer_8"}, "mlp_out_layer_8 of layer 8"),
        ("BatchTopKSAE", {"submodule_name": "resid_mid_layer_8"}, "resid_mid_layer_8 of layer 8"),
        ("BatchTopKSAE", {"submodule_name": "resid_pre_layer_8"}, "blocks.8.hook_resid_pre"),
        ("BatchTopKSAE", {"submodule_name": None}, "blocks.8.hook_resid_post"),
        ("Gemma Scope 2", {"hf_hook_point_in": "model.layers.8.mlp"}, "model.layers.8.mlp"),
        ("Llama Scope", {"hook_point_in": "a", "hook_point_out": "a"}, "a"),
    ],
)
def test_the_configuration_says_which_stream_is_read(name, changes, hook, tmp_path):
    written = WRITTEN[name]
    if name == "BatchTopKSAE":
        changes = {"trainer": written.config[1]["trainer"] | changes}
    assert open_sae(str(written.save(tmp_path, **changes)), 9).said["hook_name"] == hook


def test_what_a_buffer_reads_into_a_layer_enters_it(tmp_path):
    folder = WRITTEN["BatchTopKSAE"].save(tmp_path, buffer={"io": "in"})
    assert open_sae(str(folder), 8).said["hook_name"] == "blocks.8.hook_resid_pre"


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("gemma-scope-2b-pt-res/layer_8/width_16k/average_l0_71", "blocks.8.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp/layer_8/width_16k/average_l0_71", "blocks.8.hook_mlp_out"),
        ("gemma-scope-9b-pt-att/layer_8/width_16k/average_l0_71", "blocks.8.attn.hook_z"),
        ("gemma-scope-2b-pt-transcoders/layer_8/width_16k/average_l0_71", "blocks.8.hook_mlp_in"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "hook_embed"),
    ],
)
def test_gemma_scope_s_paths_say_which_stream_is_read(folder, hook, tmp_path):
    gemma_scope(f"{folder}/params.npz").save(tmp_path)
    assert open_sae(str(tmp_path), 9).said["hook_name"] == hook


@pytest.mark.parametrize("name", ["sparsify", "Gemma Scope", "Gemma Scope 2 without config"])
def test_a_folder_whose_name_says_no_stream_is_refused(name, tmp_path):
    written = WRITTEN[name]
    folder = (written.save(tmp_path / "a") / written.weights).parent
    assert "does not say what it reads" in refused(folder.rename(tmp_path / "mine"))


def test_of_several_sites_each_has_its_own_and_others_are_refused_by_name(tmp_path):
    for layer in (3, 8):
        gemma_scope(f"layer_{layer}/width_16k/average_l0_70/params.npz").save(tmp_path)
    assert open_sae(str(tmp_path), 4).said["hook_name"] == "blocks.3.hook_resid_post"
    told = refused(tmp_path, 5)
    assert "no SAE of site 5" in told
    assert "it has blocks.3.hook_resid_post, blocks.8.hook_resid_post" in told


def test_several_saes_of_a_site_are_listed(tmp_path):
    for active in (70, 140):
        gemma_scope(f"layer_8/width_16k/average_l0_{active}/params.npz").save(tmp_path)
    told = refused(tmp_path)
    assert "has several SAEs of site 9: give the path of one of layer_8/width_16k/" in told


def test_nothing_to_read_is_refused_with_what_was_expected(tmp_path):
    assert "expected sae_weights.safetensors (SAELens), sae.safetensors" in refused(tmp_path)
    assert "there is no such file or directory" in refused(tmp_path / "nowhere")


def test_gemma_scope_s_factor_of_fine_tuning_must_be_one(tmp_path):
    written = WRITTEN["Gemma Scope"]
    for factor, fits in ((1.0, True), (2.0, False)):
        held = written.tensors | {"scaling_factor": torch.full((LATENTS,), factor)}
        folder = written.save(tmp_path, held)
        if fits:
            open_sae(str(folder), 9)
        else:
            assert "scaling_factor is not 1" in refused(folder)


# On the hub

GEMMA = "google/gemma-scope-2b-pt-res"
QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


def test_what_is_on_the_hub_has_no_files_here():
    assert sae_files(f"{GEMMA}/layer_8", 9) == sae_files(QWEN, 3) == {}


def test_what_is_to_be_fetched_is_known_of_published_saes():
    files = ("layer_8/width_16k/average_l0_71/params.npz",)
    assert hub_files(GEMMA, [9]) == (GEMMA, files)
    larger = "google/gemma-scope-9b-pt-res"
    assert hub_files(larger, [15]) == (larger, ("layer_14/width_16k/average_l0_67/params.npz",))
    assert hub_files(QWEN, [13, 3]) == (QWEN, ("layer2.sae.pt", "layer12.sae.pt"))
    assert hub_files("some/saes/layers.3", [4]) == ("some/saes", ("layers.3/*",))
    assert hub_files("some/saes", [4]) == ("some/saes", ("*",))
    with pytest.raises(UserError, match=r"no SAE of site 0 in .*hook_resid_post, \.\.\."):
        hub_files(GEMMA, [0])


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder whose content is said to be every repository's."""

    def listed(_, hub_id: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")]

    def fetch(hub_id: str, name: str) -> str:
        assert (tmp_path / name).is_file()
        return str(tmp_path / name)

    monkeypatch.setattr(places.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(places, "hf_hub_download", fetch)
    return tmp_path


@EVERY
def test_a_repository_of_the_hub_is_read_as_a_folder_is(name, hub):
    written = WRITTEN[name]
    written.save(hub)
    here = open_sae(str(hub), LAYER + 1)
    for path in ("some/saes", f"some/saes/{written.weights.split('/')[0]}"):
        sae, said = open_sae(path, LAYER + 1)
        assert sae_fingerprint(sae) == sae_fingerprint(here.sae)
        assert said == here.said


def test_gemma_scope_s_own_choice_is_taken_of_its_repository(hub):
    gemma_scope("layer_8/width_16k/average_l0_71/params.npz").save(hub)
    gemma_scope("layer_8/width_16k/average_l0_20/params.npz").save(hub)
    assert open_sae(GEMMA, 9).said["hook_name"] == "blocks.8.hook_resid_post"


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def silent(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(places.HfApi, "list_repo_files", silent)
    monkeypatch.setattr(places, "snapshot_download", silent)
    told = refused("some/saes")
    assert "some/saes is neither a folder here nor in the local cache" in told
    assert "`python scripts/download.py model=<option>`" in told


def test_a_folder_that_a_repository_has_not(hub):
    WRITTEN["sparsify"].save(hub)
    assert "some/saes has no folder other" in refused("some/saes/other")


def test_every_format_is_tested():
    titles = {one.title for one in formats.FORMATS}
    files = {Path(one.weights).name for one in WRITTEN.values()}
    assert len(titles) == len(files) + 1  # SAELens's own has a file of tests
