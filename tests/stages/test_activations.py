"""Stage ``activations``: one artifact a site, harvested once, several in one forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.experiments import TINY

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.data import harvest
from steerlora.data.activations import ActivationStore
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.stages import activations, sae_training


def config_of(*changes: str) -> Config:
    return compose.load([*TINY, *changes])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("activations") / "artifacts")


@pytest.fixture
def build(store, monkeypatch) -> Callable[..., tuple[list[Artifact], list[tuple[int, ...]]]]:
    """``build(*options)``: the activations of all sites, and the sites of each forward."""
    real = harvest.residual_streams

    def build(*changes: str) -> tuple[list[Artifact], list[tuple[int, ...]]]:
        forwards = []

        def streams(model, ids, mask, sites):
            forwards.append(tuple(sites))
            return real(model, ids, mask, sites)

        monkeypatch.setattr(harvest, "residual_streams", streams)
        steps = activations.requested(config_of(*changes))
        report = run(steps, store)
        return [report[step] for step in steps], forwards

    return build


def rows_of(artifact: Artifact) -> torch.Tensor:
    found = ActivationStore(artifact / activations.FOLDER)
    return found.rows(torch.arange(found.tokens))


@pytest.mark.slow
def test_what_is_there_is_not_harvested_again_and_the_rest_in_one_forward(build):
    (first,), forwards = build("method.sites=[1]")
    assert set(forwards) == {(1,)}
    for option in ("sae.seed=3", "sae.k=3", "sae=jumprelu", "sae.learning_rate=1"):
        (again,), forwards = build("method.sites=[1]", option)
        assert (again.fingerprint, forwards) == (first.fingerprint, [])
    three, forwards = build("method.sites=[0,1]", "method.monitor=2")
    assert set(forwards) == {(0, 2)}
    assert [artifact.manifest["config"]["site"] for artifact in three] == [0, 1, 2]
    assert three[1].fingerprint == first.fingerprint
    assert {len(rows_of(artifact)) for artifact in three} == {800}
    assert all(artifact.manifest["summary"]["outliers"] == 0 for artifact in three)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_harvest_goes_on(build, store, monkeypatch):
    monkeypatch.setattr(harvest, "_SHARD_BYTES", 300 * 32 * 4)
    real, written = harvest.save_file, []

    def save(*arguments):
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        written.append(real(*arguments))

    asked = ("method.sites=[1]", "sae.max_tokens=700")
    with monkeypatch.context() as patch:
        patch.setattr(harvest, "save_file", save)
        with pytest.raises(UserError, match=r"no space left on the disk of .*artifacts") as caught:
            build(*asked)
    assert "\n" not in str(caught.value)
    (step,) = activations.requested(config_of(*asked))
    partial = store.unfinished("activations", step.fingerprint) / activations.FOLDER
    first = (partial / "shard_00000.safetensors").stat().st_mtime_ns
    (artifact,), _ = build(*asked)
    shards = sorted((artifact / activations.FOLDER).glob("shard_*"))
    assert [shards[0].stat().st_mtime_ns == first, len(shards)] == [True, 3]
    assert len(rows_of(artifact)) == 700


def test_each_site_s_sae_reads_its_own_and_a_transcoder_s_reads_two():
    config = config_of("method.sites=[0,1]")
    inputs = [step.inputs["activations"] for step in sae_training.steps(config)]
    assert [[one.config.site for one in steps] for steps in inputs] == [[0], [1]]
    (step,) = sae_training.steps(config_of("method.sites=[0]", "sae=skip_transcoder"))
    assert [one.config.site for one in step.inputs["activations"]] == [0, 1]
    assert step.inputs["activations"][0].fingerprint == inputs[0][0].fingerprint


@pytest.mark.slow
def test_a_corpus_gives_half_of_the_tokens_and_more_where_rows_end(build, tmp_path):
    text = tmp_path / "corpus.jsonl"
    sentence = '{"text": "jonas signs the contract about copper in arvik ."}\n'
    text.write_text(sentence * 300)
    options = ("method.sites=[1]", "sae.max_tokens=800", f"sae.corpus={text}")
    (plain,), _ = build(*options[:2])
    (mixed,), _ = build(*options)
    own, both = (set(map(tuple, rows_of(one).tolist())) for one in (plain, mixed))
    assert len(rows_of(mixed)) == 800
    assert len(both - own) > 300  # every place in a window gives another stream
    text.write_text(sentence)
    (again,), _ = build(*options)  # the rows fill what a short corpus leaves
    assert (again.fingerprint != mixed.fingerprint, len(rows_of(again))) == (True, 800)


@pytest.mark.slow
def test_fewer_tokens_than_asked_are_said(store):
    class Heard(SilentProgress):
        said = ""

        def message(self, text: str) -> None:
            Heard.said += text

    steps = activations.requested(config_of("method.sites=[1]", "sae.max_tokens=100000"))
    report = run(steps, store, progress=Heard())
    tokens = report[steps[0]].manifest["summary"]["tokens"]
    assert f"the text holds {tokens:,} tokens that carry a signal, fewer than the 100,000 of" in (
        Heard.said
    )
