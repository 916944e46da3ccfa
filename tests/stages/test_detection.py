"""Stage ``detection``: AUROC of latents, directions and words on tables of concepts."""

from __future__ import annotations

import json
import random

import pandas as pd
import pytest
from helpers.experiments import TINY

from steerlora.cli import compose
from steerlora.data.concept_rows import concept_files, read_concepts
from steerlora.data.domains.micro import words
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.stages import detection

ABOUT = {0: "plants", 1: "towns"}
METHODS = {
    *detection.DIRECTIONS,
    "bag of words",
    *(
        sae + how
        for sae in ("", "untrained SAE, ")
        for how in (
            "latent by calibrated F1",
            "latent by permuted labels",
            "latent by AUROC (SAE-A)",
        )
    ),
}


def row(concept: int, category: str, about: str, rng: random.Random) -> dict:
    said = " ".join(rng.choices(words.CATEGORIES[about], k=4))
    return {
        "input": f"write about {rng.choice(words.COLOURS)} .",
        "output": said,
        "output_concept": ABOUT.get(concept, "EEEEE"),
        "category": category,
        "concept_genre": "text",
        "concept_id": concept,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two concepts, told by the words of an answer; negatives of training belong to both."""
    rng, place = random.Random(0), tmp_path_factory.mktemp("tables")
    parts = {"train": 20, "test": 10}
    for part, count in parts.items():
        rows = [row(c, "positive", about, rng) for c, about in ABOUT.items() for _ in range(count)]
        if part == "train":
            rows += [row(-1, "negative", "people", rng) for _ in range(count)]
        else:
            rows += [row(c, "negative", "people", rng) for c in ABOUT for _ in range(count)]
            rows += [row(0, "hard negative", "stones", rng) for _ in range(3)]
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (place / f"concept2_{part}.jsonl").write_text(text)
    (place / "other_train.jsonl").write_text('{"text": "a", "label": "b"}\n')
    (place / "other_test.jsonl").write_text('{"text": "a", "label": "b"}\n')
    return place


def steps_of(*changes: str):
    return detection.requested(compose.load([*TINY, "stage=detection", *changes]))


def test_the_columns_say_which_rows_are_of_a_concept(folder):
    ((name, files),) = concept_files(folder).items()
    assert name == "concept2"
    text = read_concepts(name, files)
    assert text.concepts == ABOUT
    own, without = text.training(1)
    assert (len(own), len(without)) == (20, 20)
    assert {text.train[i].concept for i in own} == {1}
    assert {text.train[i].concept for i in without} == {-1}
    positive, negative = text.testing(0)
    assert (len(positive), len(negative)) == (10, 13)
    assert all(text.test[i].positive for i in positive)
    assert {text.test[i].concept for i in negative} == {0}


def test_every_method_has_an_auroc_for_every_concept(folder, tmp_path):
    (step,) = steps_of(f"stage.settings.text={folder}")
    artifact = run([step], ArtifactStore(tmp_path), progress=SilentProgress())[step]
    table = pd.read_csv(artifact / detection.TABLE)
    assert len(table) == len(ABOUT) * len(METHODS)
    assert set(table.method) == METHODS
    assert table.auroc.between(0, 1).all()
    means = table.groupby("method").auroc.mean()
    assert means["bag of words"] == 1  # what tells is a word
    assert means["difference of means"] > 0.9
    assert means["probe"] > 0.9
    summary = artifact.manifest["summary"]
    assert summary["probe"] == pytest.approx(means["probe"])


def test_tables_count_by_content_not_by_place(folder, tmp_path):
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in folder.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    one, other = (steps_of(f"stage.settings.text={place}")[0] for place in (folder, twin))
    assert one.fingerprint == other.fingerprint
    with (twin / "concept2_test.jsonl").open("a") as file:
        file.write(json.dumps(row(0, "positive", "plants", random.Random(1))) + "\n")
    assert steps_of(f"stage.settings.text={twin}")[0].fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([], r"give stage.settings.text=<folder>"),
        (["stage.settings.text=/nowhere"], "/nowhere: no folder with <name>_train.jsonl"),
        (["+stage.settings.rows=3"], "stage=detection has text alone"),
    ],
)
def test_bad_input_is_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        steps_of(*changes)
    assert "\n" not in str(caught.value)


def test_a_concept_without_negatives_is_said(tmp_path):
    rng = random.Random(0)
    for part in ("train", "test"):
        rows = [row(0, "positive", "plants", rng) for _ in range(3)]
        (tmp_path / f"a_{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (files,) = concept_files(tmp_path).values()
    with pytest.raises(UserError, match="no concept has two rows with it and two without"):
        read_concepts("a", files)


def test_a_row_without_a_column_is_named(folder, tmp_path):
    for part in ("train", "test"):
        text = (folder / f"concept2_{part}.jsonl").read_text()
        (tmp_path / f"a_{part}.jsonl").write_text(text)
    with (tmp_path / "a_test.jsonl").open("a") as file:
        file.write('{"input": "a"}\n')
    (files,) = concept_files(tmp_path).values()
    with pytest.raises(UserError, match=r"a_test.jsonl:\d+: output is missing"):
        read_concepts("a", files)
