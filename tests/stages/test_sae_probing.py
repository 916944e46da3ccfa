"""Stage ``sae_probing``: scores of an SAE and of an untrained one on domains and on given text."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from steerlora.data.domains.micro import words
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.stages import sae_probing

TRAINED_AND_UNTRAINED = {"name", "classes", "rows", "trained", "untrained"}


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    """The experiment's artifacts, and room for more: others count the original's."""
    return ArtifactStore(shutil.copytree(smoke.root, tmp_path_factory.mktemp("more") / "artifacts"))


def probed(smoke, store, *changes: str):
    (step,) = sae_probing.requested(smoke.config("stage=sae_probing", *changes))
    return run([step], store)[step]


@pytest.fixture
def folder(tmp_path):
    """Two data sets that share labels: which words a text has says its label and its source."""
    for source, place in (("first", "willow"), ("second", "quartz")):
        for part, count in (("train", 24), ("test", 12)):
            rows = [
                {"text": f"{place} {word} {place} {word}", "label": label}
                for word, label in (("red", "yes"), ("blue", "no")) * count
            ]
            file = tmp_path / f"{source}_{part}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_domains_are_told_apart(smoke, store):
    artifact = probed(smoke, store, "stage.settings.rows=8")
    (found,) = artifact.json("probing.json")
    assert set(found) == TRAINED_AND_UNTRAINED
    assert found["classes"] == list(smoke.config().domains.names)
    for scores in (found["trained"], found["untrained"]):
        for name in ("sae_test_accuracy", "sae_top_1_test_accuracy", "llm_top_5_test_accuracy"):
            assert 0 <= scores[name] <= 1
        assert -1 <= scores["tpp_threshold_2_total_metric"] <= 1
    assert found["trained"]["llm_test_accuracy"] == found["untrained"]["llm_test_accuracy"]
    summary = artifact.manifest["summary"]
    assert summary["sae_test_accuracy"] == found["trained"]["sae_test_accuracy"]
    assert summary["untrained_sae_test_accuracy"] == found["untrained"]["sae_test_accuracy"]


def test_given_text_is_told_apart_and_its_sources_too(smoke, store, folder):
    given = f"stage.settings.text={folder}"
    found = {one["name"]: one for one in probed(smoke, store, given).json("probing.json")}
    assert set(found) == {"first", "second", "first+second"}
    assert found["first"]["classes"] == ["no", "yes"]
    assert found["first"]["rows"] == 24
    assert found["first"]["trained"]["llm_test_accuracy"] == 1  # of two different texts
    pair = found["first+second"]
    assert set(pair["trained"]) <= {
        f"scr_{kind}_threshold_{count}" for kind in ("dir1", "dir2", "metric") for count in COUNTS
    }


def test_an_attribute_is_removed_from_text_of_two(smoke, store, tmp_path):
    """Sentences of two domains of the micro world, each about a plant or a metal: a probe that
    learnt domain and matter as one pays for it, so that there is something to regain."""
    chance = random.Random(0)
    for domain in ("medicine", "law"):
        for part, count in (("train", 60), ("test", 30)):
            rows = []
            for label, matters in (("plant", words.PLANTS), ("metal", words.METALS)) * count:
                matter, town = chance.choice(matters), chance.choice(words.TOWNS)
                about = [one for one in words.CONTEXTS[domain] if "{thing}" in one]
                filled = {"thing": matter, "town": town, "person": chance.choice(words.PEOPLE)}
                filled |= {"key": chance.choice(words.KEYS[domain])}
                rows.append({"text": chance.choice(about).format(**filled), "label": label})
            file = tmp_path / f"{domain}_{part}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = probed(smoke, store, f"stage.settings.text={tmp_path}").json("probing.json")
    found = {one["name"]: one for one in scored}
    assert found["law"]["classes"] == ["metal", "plant"]
    assert found["law"]["trained"]["llm_test_accuracy"] > 0.9
    (pair,) = (one for name, one in found.items() if "+" in name)
    latents = smoke.config().sae.latents
    expected = {f"scr_metric_threshold_{count}" for count in COUNTS if count < latents}
    for scores in (pair["trained"], pair["untrained"]):
        assert expected <= set(scores)
        assert all(score <= 1.5 for score in scores.values())


COUNTS = (2, 5, 10, 20, 50, 100, 500)


def test_text_counts_by_content_not_by_place(smoke, store, folder, tmp_path_factory):
    twin = shutil.copytree(folder, tmp_path_factory.mktemp("twin") / "text")

    def fingerprint() -> str:
        given = f"stage.settings.text={twin}"
        return sae_probing.requested(smoke.config("stage=sae_probing", given))[0].fingerprint

    (step,) = sae_probing.requested(
        smoke.config("stage=sae_probing", f"stage.settings.text={folder}")
    )
    assert fingerprint() == step.fingerprint
    with (twin / "first_train.jsonl").open("a") as file:
        file.write('{"text": "more", "label": "yes"}\n')
    assert fingerprint() != step.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("+stage.settings.words=1", "stage.settings.words: stage=sae_probing has text and rows"),
        ("stage.settings.rows=7", "stage.settings.rows=7: a number of rows from 8"),
        ("stage.settings.rows=many", "stage.settings.rows=many: a number of rows"),
        ("stage.settings.text=/nowhere", "/nowhere: no folder with jsonl files"),
    ],
)
def test_options_that_make_no_sense(change, message, smoke):
    with pytest.raises(UserError, match=message):
        sae_probing.requested(smoke.config("stage=sae_probing", change))
