"""Adapters on disk: exact round trips, and one line for everything that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import steerlora
from steerlora.errors import UserError
from steerlora.lm import identity
from steerlora.lm.identity import model_fingerprint
from steerlora.methods.routed_lora.config import HealthConfig, LossWeights
from steerlora.methods.saving import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    bundle_sae,
    save_adapter,
    trained_under,
)
from steerlora.saes.saelens import load_sae, sae_metadata, save_sae


@pytest.fixture
def saved(make_model, make_sae, make_adapter, tmp_path) -> Path:
    """A trained-looking SAE-routed adapter in ``root/adapter``, its SAE in ``root/sae``."""
    model = make_model()
    adapter = make_adapter(model)
    save_sae(adapter.saes[1], tmp_path / "root" / "sae", {})
    adapter.sites[1].facts.mean_rank = 1.7
    adapter.sites[1].facts.specialist_of_domain = {"law": 2}
    save_adapter(
        adapter,
        tmp_path / "root" / "adapter",
        base_fingerprint=model_fingerprint(model),
        sae_paths={1: tmp_path / "root" / "sae"},
    )
    return tmp_path / "root" / "adapter"


def edit(path: Path, **changes) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("signal", ["none", "dense", "sae"])
def test_round_trip_gives_equal_logits(make_model, make_adapter, tokens, tmp_path, signal):
    model = make_model()
    ids, mask = tokens([7, 5])
    adapter = make_adapter(
        model,
        signal,
        sites=(1, 2),
        temperature=0.8,
        losses=LossWeights(load_balance=0.5),
        health=HealthConfig(collapse="stop"),
    )
    expected = model(ids, attention_mask=mask).logits
    paths = {}
    for site, sae in adapter.saes.items():
        paths[site] = tmp_path / f"sae_{site}"
        save_sae(sae, paths[site], {})
    save_adapter(
        adapter, tmp_path / "a", base_fingerprint=model_fingerprint(model), sae_paths=paths
    )
    fresh = make_model()
    loaded = steerlora.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(ids, attention_mask=mask).logits, expected)
    assert loaded.config == adapter.config  # its nested sections too
    loaded.remove()
    assert torch.equal(fresh(ids).logits, make_model()(ids).logits)


def test_the_sae_travels_by_relative_path_and_facts_come_back(saved, make_model, tmp_path):
    shutil.move(tmp_path / "root", tmp_path / "elsewhere")
    adapter = steerlora.load_adapter(make_model(), tmp_path / "elsewhere" / "adapter")
    assert adapter.sites[1].facts.mean_rank == 1.7
    assert adapter.sites[1].facts.specialist_of_domain == {"law": 2}
    assert float(adapter.scales["1"]) == 2.5


def test_paths_are_right_for_the_place_an_adapter_is_moved_to(make_model, make_adapter, tmp_path):
    model = make_model()
    adapter = make_adapter(model)
    save_sae(adapter.saes[1], tmp_path / "saes" / "x", {})
    save_adapter(
        adapter,
        tmp_path / "work" / "deep" / "partial",
        base_fingerprint=model_fingerprint(model),
        sae_paths={1: tmp_path / "saes" / "x"},
        written_for=tmp_path / "final",
    )
    shutil.move(tmp_path / "work" / "deep" / "partial", tmp_path / "final")
    steerlora.load_adapter(make_model(), tmp_path / "final")


@pytest.mark.parametrize("form", ["folder", "object", "mapping"])
def test_an_sae_can_be_given(saved, make_model, tmp_path, form):
    shutil.move(tmp_path / "root" / "sae", tmp_path / "moved")
    with pytest.raises(UserError, match=r"needs the SAE of site 1 .*\.\./sae: pass sae="):
        steerlora.load_adapter(make_model(), saved)
    sae = {
        "folder": str(tmp_path / "moved"),
        "object": load_sae(tmp_path / "moved"),
        "mapping": {1: load_sae(tmp_path / "moved")},
    }[form]
    steerlora.load_adapter(make_model(), saved, sae=sae)


def test_a_bundled_folder_needs_nothing_else(make_model, make_adapter, tokens, tmp_path):
    model = make_model()
    ids, mask = tokens([7, 5])
    adapter = make_adapter(model, sites=(1, 2))
    expected = model(ids, attention_mask=mask).logits
    paths = {site: tmp_path / f"artifacts/{site}" for site in adapter.saes}
    for site, path in paths.items():
        save_sae(adapter.saes[site], path, {"site": site, "mean_feature_norm": 2.5})
    fingerprint = model_fingerprint(model)
    save_adapter(adapter, tmp_path / "a", base_fingerprint=fingerprint, sae_paths=paths)
    bundle_sae(tmp_path / "a", paths)
    shutil.rmtree(tmp_path / "artifacts")
    folder = shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    fresh = make_model()
    steerlora.load_adapter(fresh, folder)
    assert torch.equal(fresh(ids, attention_mask=mask).logits, expected)
    assert sae_metadata(folder / "sae_2") == {"site": 2, "mean_feature_norm": 2.5}
    (folder / "sae_1" / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="no SAE in"):
        steerlora.load_adapter(make_model(), folder)


def test_weights_hold_the_adapter_only(saved, make_model):
    names = {name.split(".")[0] for name in load_file(saved / WEIGHTS)}
    assert names == {"active", "layers", "routers", "scales"}


def test_another_base_is_refused(saved, make_model):
    with pytest.raises(UserError, match=r"trained on another base model .its base is [0-9a-f]{20}"):
        steerlora.load_adapter(make_model(seed=1), saved)


def test_another_sae_is_refused(saved, make_model, make_sae):
    with pytest.raises(UserError, match="another SAE at site 1"):
        steerlora.load_adapter(make_model(), saved, sae=make_sae(seed=9))


def test_what_an_adapter_was_trained_under_is_kept(make_model, make_adapter, saved, tmp_path):
    assert trained_under(saved) == "none"
    adapter = make_adapter(make_model())
    save_adapter(adapter, tmp_path / "b", base_fingerprint="x", trained_under="shuffle")
    assert trained_under(tmp_path / "b") == "shuffle"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, make_model, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"is no adapter: {name} is missing"):
        steerlora.load_adapter(make_model(), saved)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights_are_refused_in_one_line(saved, make_model, kept):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:kept])
    model = make_model()
    with pytest.raises(UserError, match="cannot be read") as caught:
        steerlora.load_adapter(model, saved)
    assert "\n" not in str(caught.value)
    (saved / WEIGHTS).write_bytes(whole)
    steerlora.load_adapter(model, saved)  # nothing of the failed attempt is left on the model


def test_edited_configs_are_refused(saved, make_model):
    good = json.loads((saved / CONFIG).read_text())
    method = good["method"]
    losses = {"losses": method["losses"] | {"no_such_loss": 1.0}}
    edits = {
        "does not fit this model: .*size mismatch": {"method": method | {"rank": 5}},
        "does not fit this model: .* no_such_key, unknown here": {
            "method": method | {"no_such_key": 5}
        },
        "does not fit this model: .* no_such_loss, unknown here": {"method": method | losses},
        "does not fit this model: .*layers 0 to 2": {"method": method | {"sites": [7]}},
        "does not fit this model: .*method.kind=routed_lore: did you mean 'routed_lora'": {
            "method": method | {"kind": "routed_lore"}
        },
        "does not fit this model: .*kind": {"method": {}},
        "is not a SteerLoRA adapter": {"format": "peft"},
        f"format version 1, this code reads {FORMAT_VERSION}: train": {"version": 1},
        "format version None": {"version": None},
        "signal_tokens are not lists": {"signal_tokens": {"prefix": "ab", "special": []}},
        "trained on another base model": {"base_fingerprint": "0" * 20},
    }
    for message, change in edits.items():
        edit(saved, **change)
        with pytest.raises(UserError, match=message) as caught:
            steerlora.load_adapter(make_model(), saved)
        assert "\n" not in str(caught.value)
        edit(saved, **good)
    for saes in (None, [7], [{}], [{"site": "1", "fingerprint": "a", "path": None}]):
        edit(saved, saes=saes)
        with pytest.raises(UserError, match="does not say which SAEs it reads"):
            steerlora.load_adapter(make_model(), saved)
    bare = {"format": "steerlora", "version": FORMAT_VERSION, "method": {}}
    (saved / CONFIG).write_text(json.dumps(bare))
    with pytest.raises(UserError, match="lacks base_fingerprint, saes, facts"):
        steerlora.load_adapter(make_model(), saved)
    (saved / CONFIG).write_text('{"format": ')
    with pytest.raises(UserError, match="is not JSON"):
        steerlora.load_adapter(make_model(), saved)


def test_a_model_that_carries_an_adapter_is_refused(saved, make_model):
    model = make_model()
    steerlora.load_adapter(model, saved)
    with pytest.raises(UserError, match="already carries an adapter"):
        steerlora.load_adapter(model, saved)


# The base's fingerprint


def test_fingerprint_survives_types_and_adapters_and_tells_bases_apart(make_model, make_adapter):
    model = make_model()
    fingerprint = model_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float64):
        assert model_fingerprint(make_model(dtype)) == fingerprint
    for signal in ("none", "dense", "sae"):
        adapted = make_model()
        make_adapter(adapted, signal)
        assert model_fingerprint(adapted) == fingerprint
    assert model_fingerprint(make_model(seed=1)) != fingerprint


@given(place=st.integers(0, 32 * 48 - 1))
@settings(max_examples=20)
def test_fingerprint_sees_every_value(place):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(32, 48), requires_grad=False)
    before = model_fingerprint(model)
    model.weight.view(-1)[place] += 2**-7  # bfloat16's next value
    assert model_fingerprint(model) != before


def test_fingerprint_sees_values_that_change_places():
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(8.0), requires_grad=False)
    before = model_fingerprint(model)
    model.weight.copy_(model.weight.flip(0))
    assert model_fingerprint(model) != before


def test_fingerprint_of_a_weight_in_several_chunks(monkeypatch):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(1000), requires_grad=False)
    whole = model_fingerprint(model)
    monkeypatch.setattr(identity, "CHUNK", 77)
    assert model_fingerprint(model) == whole
    assert len(whole) == 20
