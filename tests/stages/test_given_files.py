"""A model and an SAE of the user's own: used where they fit, refused where they do not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.saes.formats import open_sae
from steerlora.saes.saelens import load_sae, sae_fingerprint, sae_metadata
from steerlora.stages import adapter_training, base, sae_training
from steerlora.stages.common import load_base


@pytest.fixture
def given_sae(smoke, tmp_path):
    folder = next((smoke.root / "sae_training").glob("*/sae"))
    return shutil.copytree(folder, tmp_path / "sae")


@pytest.fixture
def store(smoke, tmp_path) -> ArtifactStore:
    """The experiment's artifacts, and room for more: others count the original's."""
    return ArtifactStore(shutil.copytree(smoke.root, tmp_path / "artifacts"))


def test_a_given_sae_is_used_as_it_is(smoke, store, given_sae):
    config = smoke.config(f"sae.path={given_sae}", "method=sc_lora")
    (step,) = sae_training.steps(config)
    assert "activations" not in step.inputs  # nothing is harvested for it
    built = run([step], store)[step]
    assert sae_fingerprint(load_sae(built / "sae")) == sae_fingerprint(load_sae(given_sae))
    assert built.json("quality.json")["ce_loss_without_sae"] > 0


def test_qwen_scope_s_saes_serve_the_control_sites(smoke, store, tmp_path, caplog):
    folder = tmp_path / "SAE-Res-Mine-Base-W80-L0_4"
    folder.mkdir()
    write_qwen_scope(folder, layer=0)  # which leaves the stream that enters layer 1
    options = (f"model.sae_path={folder}", "method.sites=[1]")
    steps = sae_training.steps(smoke.config(*options))
    assert "activations" not in steps[0].inputs
    built = run(steps, store)
    sae = load_sae(built[steps[0]] / "sae")
    assert (sae.k, sae.latents, sae.apply_b_dec_to_input) == (4, 80, False)
    assert sae_fingerprint(sae) == sae_fingerprint(open_sae(str(folder), 1).sae)
    # Of random numbers: a warning says so.
    assert built[steps[0]].json("quality.json")["fvu"] > 1
    assert "of the variance unexplained" in caplog.text
    trained = adapter_training.step(smoke.config(*options, "method=sc_lora"))
    found = run([trained], store)[trained] / "adapter"
    assert json.loads((found / "adapter_config.json").read_text())["saes"][0]["latents"] == 80
    # The files count by content.
    write_qwen_scope(folder, layer=0, seed=5)
    (again,) = sae_training.steps(smoke.config(*options))
    assert again.fingerprint != steps[0].fingerprint


def write_qwen_scope(folder, layer: int, seed: int = 0) -> None:
    shapes = {"W_enc": (80, 32), "W_dec": (32, 80), "b_enc": (80,), "b_dec": (32,)}
    generator = torch.Generator().manual_seed(seed + layer)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(tensors, folder / f"layer{layer}.sae.pt")


def test_a_folder_with_an_sae_a_site_serves_them_all(smoke, store, given_sae, tmp_path):
    for site in range(2):
        folder = shutil.copytree(given_sae, tmp_path / f"saes/blocks.{site}.hook_resid_pre")
        config = json.loads((folder / "cfg.json").read_text())
        config["metadata"]["hook_name"] = folder.name
        (folder / "cfg.json").write_text(json.dumps(config))
    config = smoke.config(f"sae.path={tmp_path / 'saes'}", "method.sites=[0,1]")
    steps = sae_training.steps(config)
    built = run(steps, store)
    for site, step in enumerate(steps):
        said = sae_metadata(built[step] / "sae")
        assert (said["site"], said["hook_name"]) == (site, f"blocks.{site}.hook_resid_pre")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (
            "hook_name",
            "blocks.1.hook_resid_post",
            r"entering layer 2 \(blocks\.1\.hook_resid_post\), not blocks\.1\.hook_resid_pre",
        ),
        ("hook_name", "blocks.1.hook_mlp_out", r"blocks\.1\.hook_mlp_out, not blocks\.1\.hook_r"),
        ("hook_name", "blocks.1.hook_resid_mid", r"hook_resid_mid, not blocks\.1\.hook_resid_pre"),
        ("hook_name", "model.layers.7", r"reads model\.layers\.7, not blocks\.1\.hook_resid_pre"),
        ("hook_name", None, r"does not say what it reads: set metadata\.hook_name"),
        ("base_fingerprint", "0" * 20, "another base model"),
    ],
)
def test_a_given_sae_of_another_site_or_base_is_refused(
    smoke, store, given_sae, key, value, reason
):
    config = json.loads((given_sae / "cfg.json").read_text())
    config["metadata"][key] = value
    (given_sae / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        run(sae_training.steps(smoke.config(f"sae.path={given_sae}")), store)


def test_a_given_sae_counts_by_content_and_not_by_its_place(smoke, given_sae, tmp_path):
    def fingerprint(path) -> str:
        (step,) = sae_training.steps(smoke.config(f"sae.path={path}"))
        return step.fingerprint

    first = fingerprint(given_sae)
    assert fingerprint(given_sae / "sae_weights.safetensors") == first
    copy = shutil.copytree(given_sae, tmp_path / "copy")
    assert fingerprint(copy) == first
    weights = bytearray((copy / "sae_weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "sae_weights.safetensors").write_bytes(weights)
    assert fingerprint(copy) != first


def test_a_given_sae_of_another_width_is_refused(smoke, store, given_sae):
    changed = smoke.config(f"sae.path={given_sae}", "model.width=48")
    with pytest.raises(UserError, match="reads width 32; the model has 48"):
        run(sae_training.steps(changed), store)


def test_a_given_model_is_used_and_named(smoke, store, tmp_path):
    folder = next((smoke.root / "base").glob("*/model"))
    mine = shutil.copytree(folder, tmp_path / "mine")
    words = json.loads((mine / "config.json").read_text())["vocab_size"]
    config = smoke.config(
        "model=micro_xs", f"model.path={mine}", f"model.vocabulary={words}", "method=lora"
    )
    step = adapter_training.step(config)
    report = run([step], store)
    assert report[base.step(config)].json("base.json")["path"] == str(mine)
    peft = json.loads((report[step] / "peft/adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == str(mine)


def test_a_given_model_counts_by_content_and_has_one_name(smoke, store, tmp_path, monkeypatch):
    mine = shutil.copytree(next((smoke.root / "base").glob("*/model")), tmp_path / "mine")

    def step(path):
        return base.step(
            smoke.config("model=micro_xs", f"model.path={path}", "model.vocabulary=338")
        )

    first = step(mine)
    monkeypatch.chdir(tmp_path)
    assert step("mine").fingerprint == step("../" + tmp_path.name + "/mine").fingerprint
    assert step("mine").fingerprint == first.fingerprint
    built = run([step("mine")], store)[first]
    monkeypatch.chdir("/")
    assert load_base(built)[0].config.num_hidden_layers == 2
    # Merged again into the same folder: the last value of the last tensor is another one.
    weights = bytearray((mine / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (mine / "model.safetensors").write_bytes(weights)
    assert step(mine).fingerprint != first.fingerprint


def test_a_model_of_another_shape_than_the_configuration_says_is_refused(smoke, store, tmp_path):
    mine = shutil.copytree(next((smoke.root / "base").glob("*/model")), tmp_path / "mine")
    config = smoke.config(
        "model=micro_xs", f"model.path={mine}", "model.layers=3", "model.tied=false"
    )
    with pytest.raises(UserError) as error:
        run([base.step(config)], store)
    found = "set model.layers=2 model.vocabulary=338 model.tied=true"
    assert str(error.value).endswith(found)


def test_thinking_is_the_base_s_from_its_artifact_on(smoke, store, make_tokenizer, tmp_path):
    mine = shutil.copytree(next((smoke.root / "base").glob("*/model")), tmp_path / "mine")
    make_tokenizer().save_pretrained(mine)
    step = base.step(
        smoke.config(
            "model=micro_xs", f"model.path={mine}", "model.vocabulary=338", "model.thinking=false"
        )
    )
    artifact = run([step], store)[step]
    _, tokenizer = load_base(artifact)
    turns = [{"role": "user", "content": "2+2"}]
    opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert opened.endswith("</think>\n\n")
    with pytest.raises(UserError, match="models pretrained here do not think"):
        smoke.config("model.thinking=false")


def test_a_model_that_is_not_there_is_one_line(smoke, store):
    with pytest.raises(UserError, match=r"model\.path=/nowhere/at/all cannot be loaded"):
        run([base.step(smoke.config("model=micro_xs", "model.path=/nowhere/at/all"))], store)
