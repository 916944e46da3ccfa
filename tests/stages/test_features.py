"""The features stage against counting token by token, and its table."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from steerlora.artifacts import ArtifactStore
from steerlora.data.chat import encode_chats
from steerlora.formats.sae import load_sae
from steerlora.models.decoder import residual_streams
from steerlora.pipeline import run
from steerlora.stages import features
from steerlora.stages.common import load_base, read_rows


@pytest.fixture(scope="module")
def built(smoke, tmp_path_factory):
    """The stage's artifact, and the upstream artifacts it read."""
    config = smoke.config("features.shown=3", "features.examples=2")
    (step,) = features.steps(config)
    # Beside the experiment's own artifacts, which other tests count.
    root = shutil.copytree(smoke.root, tmp_path_factory.mktemp("features") / "artifacts")
    report = run([step, *step.upstream], ArtifactStore(root))
    return report[step].path, {name: report[value] for name, value in step.inputs.items()}


@torch.no_grad()
def test_mean_and_frequency_equal_a_loop_over_tokens(built):
    artifact, upstream = built
    model, tokenizer = load_base(upstream["base"])
    sae = load_sae(upstream["sae"] / "sae")
    stored = load_file(artifact / features.WEIGHTS)
    for number, name in enumerate(upstream["domains"].json("domains.json")["names"]):
        total, active, tokens = torch.zeros(sae.latents), torch.zeros(sae.latents), 0
        rows = read_rows(upstream["domains"] / f"train/{name}.jsonl")
        for row in encode_chats(tokenizer, rows, 128):
            ids = torch.tensor([row.input_ids])
            stream = residual_streams(model, ids, torch.ones_like(ids), [1])[1][0, 1:]
            for x in stream:
                values, indices = sae.encode(x)
                total[indices] += values
                active[indices] += (values > 0).float()
                tokens += 1
        torch.testing.assert_close(
            stored["mean"][number], (total / tokens).double(), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(
            stored["frequency"][number], (active / tokens).double(), atol=2e-3, rtol=0
        )


def test_masks_exclude_each_other_and_prototypes_follow_them(built):
    stored = load_file(built[0] / features.WEIGHTS)
    assert not (stored["domain"] & stored["general"]).any()
    assert torch.equal(stored["prototypes"] != 0, stored["domain"] & (stored["mean"] != 0))
    assert stored["general"].any()
    assert stored["domain"].any(1).all()


def test_the_table_names_every_domain_and_shows_words(built):
    artifact, upstream = built
    lines = (artifact / features.TABLE).read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    assert {row[0].strip() for row in rows} == set(
        upstream["domains"].json("domains.json")["names"]
    )
    assert all(len(row) == 6 for row in rows)
    assert all(row[4].strip() for row in rows), "a feature without a token"


def test_examples_are_the_strongest_and_in_order(built):
    listing = json.loads((built[0] / features.LISTING).read_text())
    for entries in listing.values():
        assert len(entries) <= 3
        selectivity = [entry["selectivity"] for entry in entries]
        assert selectivity == sorted(selectivity, reverse=True)
        for entry in entries:
            values = [example["value"] for example in entry["examples"]]
            assert 1 <= len(values) <= 2
            assert values == sorted(values, reverse=True)
