"""What a sequence left behind, taken elsewhere: pruned of domains, and a PEFT folder a domain."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.torch import load_file

from steerlora.data.chat import encode_chat
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.methods.saving import WEIGHTS, load_adapter
from steerlora.stages import export
from steerlora.stages.common import load_base

SEQUENCE = ("order=given", "order.sequence=[law,math]")


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    root = tmp_path_factory.mktemp("exports") / "artifacts"
    return ArtifactStore(shutil.copytree(smoke.root, root))


@pytest.mark.parametrize("method", ["sc_lora_context", "any_ssr"])
def test_the_domains_that_stay_are_routed_to_and_exported(method, smoke, store, tmp_path):
    asked = ("stage=export", f"method={method}", *SEQUENCE, "stage.settings.domains=[math]")
    step = export.step(smoke.config(*asked))
    artifact = run([step], store)[step]
    assert [folder.name for folder in (artifact / export.PEFT_FOLDER).iterdir()] == ["math"]
    exported = load_file(artifact / export.PEFT_FOLDER / "math" / WEIGHTS)
    said = json.loads((artifact / export.PEFT_FOLDER / "math/adapter_config.json").read_text())
    assert said["r"] == step.config.method.rank
    # By itself: moved away from every artifact.
    moved = shutil.copytree(artifact / export.ADAPTER, tmp_path / "adapter")
    model, tokenizer = load_base(run([step.inputs["base"]], store)[step.inputs["base"]])
    adapter = load_adapter(model, moved)
    row = encode_chat(tokenizer, "who?", "x", 64)
    (nearness,) = adapter.nearness([row], tokenizer.pad_token_id).values()
    assert nearness[0, 0] == -math.inf  # law
    assert nearness[0, 1] > -math.inf
    rank = adapter.config.rank
    for layer in adapter.layers.values():
        assert not layer.A[:rank].any()
        assert not layer.B[:, :rank].any()
    kept = {tuple(layer.A[rank : 2 * rank].flatten().tolist()) for layer in adapter.layers.values()}
    assert kept == {
        tuple(value.flatten().tolist()) for name, value in exported.items() if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("method=lora",), "method=lora has no part for each domain to export"),
        (("method=epi", "+stage.settings.kept=[law]"), "stage.settings.kept: stage=export has"),
        (("method=epi", "stage.settings.domains=[music]"), "'music' is none of the sequence's"),
        (("method=epi", "stage.settings.domains=[]"), "leaves no domain: name one"),
    ],
)
def test_what_cannot_be_exported_is_refused(changes, says, smoke):
    with pytest.raises(UserError, match=says):
        export.step(smoke.config("stage=export", *SEQUENCE, *changes))
