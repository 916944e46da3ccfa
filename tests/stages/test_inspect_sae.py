"""Stage ``inspect_sae``: the figures of an SAE that fits, and refusals of those that do not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.sae_files import gemma_scope

from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.saes.relu import ReLU
from steerlora.saes.saelens import save_sae
from steerlora.stages import inspect_sae
from steerlora.stages.sae_quality import implausible

WIDTH = 32


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    """The experiment's artifacts, and room for more: others count the original's."""
    return ArtifactStore(shutil.copytree(smoke.root, tmp_path_factory.mktemp("more") / "artifacts"))


def inspect(smoke, store, path, *changes: str) -> dict:
    options = (f"sae.path={path}", "stage=inspect_sae", "method.sites=[1]", *changes)
    (step,) = inspect_sae.requested(smoke.config(*options))
    return run([step], store)[step].json("inspection.json")


def mirror(folder, *, scale: float = 1.0, hook: str = "blocks.1.hook_resid_pre", **config):
    """An SAE that gives back ``scale`` times what it is given: both signs of every coordinate."""
    sae = ReLU(WIDTH, 10 * WIDTH, apply_b_dec_to_input=False)
    rows = torch.zeros(10 * WIDTH, WIDTH)
    rows[:WIDTH], rows[WIDTH : 2 * WIDTH] = torch.eye(WIDTH), -torch.eye(WIDTH)
    with torch.no_grad():
        sae.W_enc.copy_(rows.t())
        sae.W_dec.copy_(scale * rows)
    save_sae(sae, folder, {"hook_name": hook})
    said = json.loads((folder / "cfg.json").read_text()) | config
    (folder / "cfg.json").write_text(json.dumps(said))
    return folder


def test_what_an_sae_is_and_how_well_it_does(smoke, store, tmp_path):
    report = inspect(smoke, store, mirror(tmp_path / "sae"))
    assert report["architecture"] == "relu"
    assert (report["W_enc"], report["W_dec"]) == ("[32, 320]", "[320, 32]")
    assert report["fvu"] == pytest.approx(0, abs=1e-6)
    assert 0 < report["l0"] <= WIDTH
    assert report["ce_loss_with_sae"] == pytest.approx(report["ce_loss_without_sae"], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "every word of it\n\nand another paragraph\n\n"),
        ("a.jsonl", '{"text": "every word of it"}\n{"text": "and another paragraph"}\n'),
    ],
)
def test_text_of_the_user_s_is_read_in_place_of_held_out_rows(
    name, content, smoke, store, tmp_path
):
    (tmp_path / name).write_text(content)
    given = f"stage.settings.text={tmp_path / name}"
    report = inspect(smoke, store, mirror(tmp_path / "sae"), given)
    assert 0 < report["tokens"] < 60


def test_an_expected_norm_is_measured_on_the_text(smoke, store, tmp_path):
    """The same reconstruction: a scale that is put on and taken off changes no linear map."""
    expected = {"normalize_activations": "expected_average_only_in"}
    report = inspect(smoke, store, mirror(tmp_path / "sae", **expected))
    plain = inspect(smoke, store, mirror(tmp_path / "plain"))
    assert report["fvu"] == pytest.approx(0, abs=1e-6)
    assert report["l1"] == pytest.approx(plain["l1"] * WIDTH**0.5 / norm_of(plain), rel=1e-3)


def norm_of(report: dict) -> float:
    """The mean norm of x: of a mirror, that of its features."""
    return report["mean_feature_norm"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"scale": -1.0}, "it leaves .* of the variance unexplained"),
        ({"hook": "blocks.1.hook_mlp_out"}, "reads blocks.1.hook_mlp_out, not blocks.1.hook_res"),
        ({"hook": "blocks.0.hook_resid_pre"}, r"layer 0 \(blocks.0.hook_resid_pre\), not blocks.1"),
    ],
)
def test_what_does_not_fit_is_refused(made, message, smoke, store, tmp_path):
    with pytest.raises(UserError, match=message):
        inspect(smoke, store, mirror(tmp_path / "sae", **made))


def test_a_published_sae_of_another_width_is_refused(smoke, store, tmp_path):
    gemma_scope("layer_0/width_16k/average_l0_3/params.npz").save(tmp_path)
    with pytest.raises(UserError, match="reads width 6; the model has 32"):
        inspect(smoke, store, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sae.path=null"], "needs sae.path="),
        (["+stage.settings.words=1"], "stage.settings.words: stage=inspect_sae has text alone"),
        (["stage.settings.text=/nowhere/a.txt"], "/nowhere/a.txt"),
    ],
)
def test_options_that_make_no_sense(changes, message, smoke, store, tmp_path):
    with pytest.raises(UserError, match=message):
        inspect(smoke, store, mirror(tmp_path / "sae"), *changes)


@pytest.mark.parametrize("content", ['{"prompt": "a"}\n', '{"text": ""}\n', "\xff"])
def test_text_that_cannot_be_read_is_one_line(content, smoke, store, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as error:
        inspect(smoke, store, mirror(tmp_path / "sae"), f"stage.settings.text={file}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"fvu": 0.3, "l0": 20.0}, None),
        ({"fvu": 1.0, "l0": 20.0}, "leaves 1 of the variance"),
        ({"fvu": float("nan"), "l0": 20.0}, "leaves nan"),
        ({"fvu": 0.9, "l0": 0.0}, "no latent is active"),
        ({"fvu": 0.1, "l0": 50.0}, "50 of 100 latents are active"),
    ],
)
def test_figures_that_are_implausible(figures, said):
    found = implausible(figures, latents=100)
    assert found is None if said is None else said in found
