"""``sae.stream=true``: SAEs trained beside the base, without stored activations."""

from __future__ import annotations

import shutil

import pytest
from helpers.experiments import TINY

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.data import streaming
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.engine.steps import STAGES, Step
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

    assert name("sae.stream_buffer=99", "sae.stream_seed=3") == name()
    assert name("sae.stream=true", "sae.stream_seed=3") != name("sae.stream=true")
    assert name("sae.stream=true") != name()
    assert name("sae.stream=true", "sae.stream_buffer=99") != name("sae.stream=true")
    assert name("sae.stream=true", "sae.max_tokens=99") == name("sae.stream=true")


def test_passes_over_what_is_not_stored_are_refused():
    with pytest.raises(UserError, match=r"sae\.stream=true with sae\.epochs=5: .*sae\.epochs=null"):
        config_of("sae=relu", "sae.steps=null", "sae.stream=true")


def requested(*changes: str) -> tuple[Step, ...]:
    asked = ["stage=sae_training", "method.sites=[0,1]", "sae.stream=true", *changes]
    return STAGES["sae_training"].steps(config_of(*asked), lambda *more: config_of(*asked, *more))


@pytest.mark.slow
def test_every_combination_shares_one_stream_and_comes_out_as_alone(store, tmp_path, monkeypatch):
    steps = requested("sae.steps=6", "stage.settings={k: [2, 4], seed: [0, 1]}")
    assert len(steps) == 8
    forwards, real = [], streaming.residual_streams
    monkeypatch.setattr(
        streaming, "residual_streams", lambda *a: forwards.append(a[-1]) or real(*a)
    )
    report = run(steps, store)
    assert set(forwards) == {(0, 1)}
    once = len(forwards)
    apart = ArtifactStore(tmp_path / "artifacts")
    for upstream in ("domains", "base"):
        shutil.copytree(store.root / upstream, apart.root / upstream)
    for step in (steps[0], steps[-1]):
        alone = run([step], apart)[step]
        ours = report[step]
        assert alone.fingerprint == ours.fingerprint
        for file in ("sae/sae_weights.safetensors", "quality.json", "held_out.json"):
            assert (alone / file).read_bytes() == (ours / file).read_bytes()
    assert len(forwards) == 3 * once
    names = {report[step].manifest["summary"]["fingerprint"] for step in steps}
    assert len(names) == 8


def test_only_what_takes_as_many_steps_shares_a_stream():
    def groups(*changes: str) -> int:
        return len({step.group for step in requested(*changes)})

    assert groups("sae.steps=6", "stage.settings={latents: [64, 128], k: [2, 4]}") == 1
    assert groups("sae.steps=null", "stage.settings={latents: [64, 128], k: [2, 4]}") == 2
    assert groups("stage.settings={batch_size: [64, 128]}") == 2
    assert groups("sae.stream=false", "stage.settings={seed: [0, 1]}") == 4
    assert groups("trainer=zero2", "stage.settings={seed: [0, 1]}") == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{kk: [1]}", r"stage\.settings\.kk: no key of sae; did you mean 'k'"),
        ("{k: 3}", r"stage\.settings\.k=3: must be a list of values of sae\.k"),
        ("{k: []}", r"stage\.settings\.k=\[\]: must be a list"),
        ("{k: [600]}", r"sae\.k=600 is more than sae\.latents"),
    ],
)
def test_a_wrong_list_is_named(settings, says):
    with pytest.raises(UserError, match=says):
        requested(f"stage.settings={settings}")
