"""The notebook in docs/ runs from its first cell to its last, and is stored as nothing has run."""

from __future__ import annotations

import json
import shlex
from typing import Any

import matplotlib.pyplot as plt
import pytest
from helpers.readme import ROOT, shrunk
from PIL import Image

import steerlora

NOTEBOOK = json.loads((ROOT / "docs/first_run.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The door, leading to sizes that teach nothing; the notebook's folder is an empty one."""
    door = steerlora.run

    def run(*overrides: str) -> Any:
        asked = [o for o in overrides if o not in ("experiment=smoke", "logger=none")]
        command = shlex.join(["steerlora", *asked])
        return door(*shrunk(command, tmp_path, tmp_path / "artifacts", tmp_path))

    monkeypatch.setattr(steerlora, "run", run)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def test_it_runs_and_ends_in_a_figure(small):
    names: dict[str, Any] = {}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), "first_run.ipynb", "exec"), names)
    scores = names["scores"]
    assert sorted(zip(scores["method.name"], scores["method.rank"], strict=True)) == [
        *(("lora", 2), ("lora", 8), ("sc_lora", 2), ("sc_lora", 8))
    ]
    assert Image.open(small / "first_run.png").size == (500, 300)


def test_it_is_stored_without_output():
    assert CELLS
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
