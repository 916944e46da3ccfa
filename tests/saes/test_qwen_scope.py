"""Qwen-Scope's SAEs: what is theirs alone; tests of all formats have their arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.sae_files import WRITTEN
from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError

from steerlora.errors import UserError
from steerlora.saes import places
from steerlora.saes.formats import open_sae, sae_files

HUB_ID = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Layers 0 and 2 of a model, k 3."""
    written = WRITTEN["Qwen-Scope"]
    folder = (written.save(tmp_path) / written.weights).parent
    for layer in (0, 2):
        (folder / f"layer{layer}.sae.pt").write_bytes((folder / "layer8.sae.pt").read_bytes())
    (folder / "layer8.sae.pt").unlink()
    return folder


def refused(path: Path | str, site: int) -> str:
    with pytest.raises(UserError) as error:
        open_sae(str(path), site)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_read_is_the_file_of_the_layer_with_the_k_of_the_name(folder):
    assert sae_files(str(folder), 3) == {"L0_3": folder / "layer2.sae.pt"}
    sae, said = open_sae(str(folder), 3)
    assert (sae.k, sae.apply_b_dec_to_input) == (3, False)
    assert said == {"hook_name": "blocks.2.hook_resid_post"}


def test_a_file_of_the_hub_is_fetched_by_its_layer(folder, monkeypatch):
    asked = []

    def fetch(path, name):
        asked.append((path, name))
        return str(folder / name)

    monkeypatch.setattr(places, "hf_hub_download", fetch)
    hub_id = HUB_ID.replace("L0_50", "L0_3")
    assert open_sae(hub_id, 3).sae.k == 3
    assert asked == [(hub_id, "layer2.sae.pt")]


def test_sites_that_it_has_not(folder):
    told = "it has blocks.0.hook_resid_post, blocks.2.hook_resid_post"
    assert told in refused(folder, 2)
    assert told in refused(folder, 0)


def test_a_folder_without_k_in_its_name(folder):
    assert "must end in L0_<k>" in refused(folder.rename(folder.parent / "mine"), 1)


def test_a_hub_that_does_not_answer_or_has_no_such_layer(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(HUB_ID, 11)
    assert "layer10.sae.pt is not in the local cache and the hub cannot be reached" in said
    assert "`python scripts/download.py model=<option>` and run with HF_HUB_OFFLINE=1" in said

    class Response:
        status_code, headers, request = 404, {}, None

    def absent(*_):
        raise RemoteEntryNotFoundError("404", response=Response())

    monkeypatch.setattr(places, "hf_hub_download", absent)
    assert f"{HUB_ID} has no layer98.sae.pt" in refused(HUB_ID, 99)
