"""Ancestry, as manifests tell it."""

from __future__ import annotations

import shutil

import pytest
from helpers.artifacts import store, store_adapter

from steerlora.engine.lineage import Library


@pytest.fixture
def adapter(tmp_path):
    return store_adapter(tmp_path, method="sc_lora", rank=4, seed=0)["adapter"]


def test_everything_upstream_comes_before_what_was_built_from_it(tmp_path, adapter):
    library = Library(tmp_path)
    found = library.ancestry(library.find(adapter))
    assert [one.stage for one in found] == ["domains", "base", "sae_training", "adapter_training"]
    for place, one in enumerate(found):
        earlier = {other.fingerprint for other in found[:place]}
        assert set(one.manifest["inputs"].values()) <= earlier


def test_an_input_that_is_gone_is_left_out(tmp_path, adapter):
    shutil.rmtree(tmp_path / "sae_training")
    library = Library(tmp_path)
    stages = [one.stage for one in library.ancestry(library.find(adapter))]
    assert stages == ["domains", "base", "adapter_training"]


def test_only_complete_artifacts_are_listed(tmp_path, adapter):
    other = store(tmp_path, "base", {"model": {"name": "other"}})
    (tmp_path / "base" / other / "manifest.json").unlink()
    (tmp_path / "base" / f"{adapter}.partial").mkdir()
    assert {one.stage for one in Library(tmp_path).all()} == {
        *("domains", "base", "sae_training", "adapter_training")
    }
    assert Library(tmp_path).find(other) is None
