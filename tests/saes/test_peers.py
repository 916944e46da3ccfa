"""Files of other libraries made by these libraries themselves, and our files read by SAELens.

Runs where ``STEERLORA_PEERS`` names a Python that has sae-lens, eai-sparsify and
dictionary-learning, or where the Python of the tests has them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import peer_saes
from helpers.peer_saes import KNOWN, LATENTS, LAYER, MADE, ROWS, SAID, WIDTH, K
from safetensors.torch import load_file, save_file

from steerlora.saes.batch_topk import BatchTopK
from steerlora.saes.config import SAES
from steerlora.saes.formats import open_sae, site_of
from steerlora.saes.saelens import load_sae, save_sae

LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning")
HERE = all(map(importlib.util.find_spec, LIBRARIES))
PEERS = os.environ.get("STEERLORA_PEERS") or (sys.executable if HERE else None)
pytestmark = [
    pytest.mark.skipif(PEERS is None, reason="STEERLORA_PEERS names no Python with the libraries"),
    pytest.mark.slow,
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WRITTEN = {
    "sae_lens": 14,
    "sparsify": 3,
    "dictionary_learning": 7,
}
"""How many SAEs each library writes."""


def by_peers(*arguments: str | Path) -> str:
    """What the script says that runs in their environment."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PEERS, peer_saes.__file__, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env=own)
    assert not ran.returncode, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """One SAE of every kind, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("theirs")
    by_peers("write", folder)
    return folder


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_writes_is_read_as_it_reads_it(library, theirs):
    made = sorted((theirs / library).rglob(MADE))
    assert len(made) == WRITTEN[library]
    for file in made:
        sae, said = open_sae(str(file.parent), LAYER + 1)
        expected = load_file(file)
        x = expected["rows"]
        dense = sae.encode(x).dense(LATENTS)
        assert 0 < (expected["features"] > 0).sum() < expected["features"].numel(), file
        torch.testing.assert_close(dense, expected["features"], **CLOSE, msg=str(file))
        torch.testing.assert_close(sae(x), expected["output"], **CLOSE, msg=str(file))
        assert site_of(said["hook_name"]) == LAYER + 1
        if library == "sae_lens":
            assert {key: said[key] for key in KNOWN} == KNOWN


OURS: dict[str, dict] = {
    "topk": {"k": K},
    "topk layer_norm": {"k": K, "normalize": "layer_norm"},
    "topk constant_norm_rescale": {"k": K, "normalize": "constant_norm_rescale"},
    "relu": {},
    "relu without b_dec": {"apply_b_dec_to_input": False},
    "jumprelu": {},
    "gated": {},
    "batch_topk": {"k": K},
    "matryoshka_topk": {"k": K, "levels": 2},
    "matryoshka_batch_topk": {"k": K, "levels": 2},
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """SAEs of every architecture that SAELens has too, read by it."""
    folder = tmp_path_factory.mktemp("ours")
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(8))
    save_file({"rows": x}, folder / ROWS)
    for name, settings in OURS.items():
        sae = SAES[name.split()[0]].module()(WIDTH, LATENTS, **settings)
        peer_saes.shaken(sae)
        if isinstance(sae, BatchTopK):
            sae.threshold.fill_(0.4)
        save_sae(sae, folder / name, KNOWN)
    by_peers("read", folder)
    return folder


@pytest.mark.parametrize("name", OURS)
def test_saelens_reads_what_is_written_here(name, ours: Path):
    sae, made = load_sae(ours / name), load_file(ours / name / MADE)
    x = load_file(ours / ROWS)["rows"]
    torch.testing.assert_close(sae.encode(x).dense(LATENTS), made["features"], **CLOSE)
    torch.testing.assert_close(sae(x), made["output"], **CLOSE)
    said = json.loads((ours / name / SAID).read_text())
    assert {key: said[key] for key in KNOWN} == KNOWN


def test_what_saelens_does_not_have_is_not_tested_as_if_it_had():
    assert {name.split()[0] for name in OURS} == set(SAES) - {"skip_transcoder"}
