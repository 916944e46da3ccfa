"""``sae.stream=true``: SAEs trained beside the base, without stored activations."""

from __future__ import annotations

import pytest
from helpers.experiments import TINY

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.stages import sae_training

LEARNT = ("model.steps=30", "domains.pretrain_items=400", "sae.steps=60", "sae.learning_rate=3e-3")


def config_of(*changes: str) -> Config:
    return compose.load([*TINY, *LEARNT, *changes])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("streaming") / "artifacts")


def build(store: ArtifactStore, *changes: str) -> Artifact:
    (step,) = sae_training.steps(config_of(*changes))
    return run([step], store)[step]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "skip_transcoder"])
def test_it_learns_as_from_stored_activations_and_stores_none(store, architecture):
    streamed = build(store, f"sae={architecture}", "sae.stream=true", "sae.stream_buffer=1000")
    assert not (store.root / "activations").exists() or architecture != "topk"
    kept = build(store, f"sae={architecture}", "sae.max_tokens=3000")
    found, expected = (one.json("quality.json")["fvu"] for one in (streamed, kept))
    assert found == pytest.approx(expected, rel=0.25)
    history = streamed.json("held_out.json")
    assert history[-1]["fvu"] < history[0]["fvu"]
    again = build(store, f"sae={architecture}", "sae.stream=true", "sae.stream_buffer=1000")
    assert again == streamed


@pytest.mark.slow
def test_a_corpus_is_streamed_beside_the_rows(store, tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("jonas signs the contract about copper in arvik .\n" * 300)
    options = ("sae.stream=true", "sae.stream_buffer=500", "sae.steps=4")
    plain, mixed = (build(store, *options, *more) for more in ((), (f"sae.corpus={text}",)))
    assert plain.fingerprint != mixed.fingerprint
    assert plain.json("quality.json")["fvu"] != mixed.json("quality.json")["fvu"]


def test_the_buffer_counts_with_a_stream_alone():
    def name(*changes: str) -> str:
        (step,) = sae_training.steps(config_of(*changes))
        return step.fingerprint

    assert name("sae.stream_buffer=99") == name()
    assert name("sae.stream=true") != name()
    assert name("sae.stream=true", "sae.stream_buffer=99") != name("sae.stream=true")
    assert name("sae.stream=true", "sae.max_tokens=99") == name("sae.stream=true")


def test_passes_over_what_is_not_stored_are_refused():
    with pytest.raises(UserError, match=r"sae\.stream=true with sae\.epochs=5: .*sae\.epochs=null"):
        config_of("sae=relu", "sae.steps=null", "sae.stream=true")
