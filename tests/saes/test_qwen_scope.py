"""Qwen-Scope's SAEs: its layout and arithmetic, one site at a time, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError

from steerlora.errors import UserError
from steerlora.saes import qwen_scope
from steerlora.saes.qwen_scope import is_qwen_scope, load_qwen_scope, qwen_scope_files
from steerlora.saes.saelens import load_sae, open_sae, sae_fingerprint, save_sae

WIDTH, LATENTS, K = 6, 20, 3
HUB_ID = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """As the files hold them: encoder and decoder are each the transpose of SAELens'."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (LATENTS, WIDTH),
        "W_dec": (WIDTH, LATENTS),
        "b_enc": (LATENTS,),
        "b_dec": (WIDTH,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Layers 0 and 2 of a model."""
    folder = tmp_path / f"SAE-Res-Some-Base-W20-L0_{K}"
    folder.mkdir()
    for layer in (0, 2):
        torch.save(tensors(layer), folder / f"layer{layer}.sae.pt")
    return folder


@pytest.mark.parametrize("layer", [0, 2])
def test_features_are_topk_of_the_product_with_the_stream_that_leaves_the_layer(folder, layer):
    stored = tensors(layer)
    sae, said = open_sae(str(folder), layer + 1)
    assert said == {}
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(9))
    scores = x @ stored["W_enc"].t() + stored["b_enc"]  # no b_dec is subtracted
    kept = torch.where(scores >= scores.topk(K).values[:, -1:], scores, 0).relu()
    features = sae.encode(x)
    dense = torch.zeros(50, LATENTS).scatter(1, features.indices, features.values)
    torch.testing.assert_close(dense, kept)
    torch.testing.assert_close(sae(x), kept @ stored["W_dec"].t() + stored["b_dec"])
    assert not sae.training
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def test_it_is_saved_as_any_other(folder, tmp_path):
    sae = load_qwen_scope(str(folder), 3)
    save_sae(sae, tmp_path / "saelens", {})
    assert sae_fingerprint(load_sae(tmp_path / "saelens")) == sae_fingerprint(sae)


def test_what_is_qwen_scope_s(folder, tmp_path):
    assert is_qwen_scope(str(folder))
    assert is_qwen_scope(HUB_ID)
    assert not is_qwen_scope(str(tmp_path))
    assert not is_qwen_scope("Qwen/Qwen3-1.7B")


def test_what_is_read_is_the_file_of_the_layer_with_the_k_of_the_name(folder):
    assert qwen_scope_files(str(folder), 3) == {f"L0_{K}": folder / "layer2.sae.pt"}
    assert qwen_scope_files(HUB_ID, 3) == {}


def test_a_file_of_the_hub_is_fetched_by_its_layer(folder, monkeypatch):
    asked = []

    def fetch(path, name):
        asked.append((path, name))
        return str(folder / name)

    monkeypatch.setattr(qwen_scope, "hf_hub_download", fetch)
    hub_id = HUB_ID.replace("L0_50", f"L0_{K}")
    assert load_qwen_scope(hub_id, 3).k == K
    assert asked == [(hub_id, "layer2.sae.pt")]


def refused(path: Path | str, site: int) -> str:
    with pytest.raises(UserError) as error:
        open_sae(str(path), site)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sites_that_it_has_not(folder):
    assert "has no layer1.sae.pt, which site 2 needs; it has those of sites 1, 3" in refused(
        folder, 2
    )
    assert "reads what leaves a layer: set method.sites to layers from 1" in refused(folder, 0)


def test_a_folder_without_k_in_its_name(folder):
    assert "must end in L0_<k>" in refused(folder.rename(folder.parent / "mine"), 1)


def test_files_that_are_no_sae(folder):
    file = folder / "layer0.sae.pt"
    torch.save({"encoder.weight": torch.zeros(2)}, file)
    assert "it holds encoder.weight, not W_enc, b_enc, W_dec, b_dec" in refused(folder, 1)
    torch.save([1], file)
    assert "it holds list" in refused(folder, 1)
    right = tensors(0)
    torch.save(right | {"W_enc": right["W_enc"].t().contiguous()}, file)
    assert f"W_enc is [{WIDTH}, {LATENTS}]" in refused(folder, 1)
    torch.save(right | {"b_enc": torch.full((LATENTS,), torch.nan)}, file)
    assert "20 of the 20 values of b_enc are NaN or infinite" in refused(folder, 1)
    torch.save(right | {"b_enc": 1}, file)
    assert "holds more than tensors" in refused(folder, 1)
    file.write_bytes(b"no tensors")
    assert "cannot be read" in refused(folder, 1)
    torch.save({"W_enc": Path("a pickled object")}, file)
    assert "cannot be read" in refused(folder, 1)


def test_a_hub_that_does_not_answer_or_has_no_such_layer(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(HUB_ID, 11)
    assert "layer10.sae.pt is not in the local cache and the hub cannot be reached" in said
    assert "`python scripts/download.py model=<option>` and run with HF_HUB_OFFLINE=1" in said

    class Response:
        status_code, headers, request = 404, {}, None

    def absent(*_):
        raise RemoteEntryNotFoundError("404", response=Response())

    monkeypatch.setattr(qwen_scope, "hf_hub_download", absent)
    assert "its model has fewer layers" in refused(HUB_ID, 99)
