"""The comparison runs where no library is installed, and its figures are those of the SAE."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import bench_sae_quality
import pytest
import torch
from safetensors.torch import save_file

from steerlora.data.activations import STORE_FILE, shard_path

WIDTH, TOKENS = 8, 600


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """As stage ``activations`` leaves one: every token in a direction of four, somewhat noisy."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, WIDTH, generator=generator)
    chosen = torch.randint(4, (TOKENS,), generator=generator)
    rows = directions[chosen] + 0.01 * torch.randn(TOKENS, WIDTH, generator=generator)
    folder = tmp_path / "activations"
    folder.mkdir()
    save_file({"activations": rows, "norms": rows.norm(dim=1)}, shard_path(folder, 0))
    said = {"site": 1, "width": WIDTH, "dtype": "float32", "shard_tokens": [TOKENS]}
    (folder / STORE_FILE).write_text(json.dumps(said | {"without_signal": 0}))
    return tmp_path


@pytest.fixture
def bench(artifact, monkeypatch, capsys) -> Callable[..., str]:
    """``bench(...)``: what the script prints with these arguments."""
    monkeypatch.setattr(bench_sae_quality, "HELD_OUT", 100)
    monkeypatch.setattr(bench_sae_quality, "installed", lambda library: False)

    def run(*arguments: str) -> str:
        sizes = ["--latents", "16", "--k", "4", "--batch-size", "128", "--seeds", "0", "1"]
        arguments = (str(artifact), *sizes, *arguments)
        monkeypatch.setattr(sys, "argv", ["bench_sae_quality.py", *arguments])
        bench_sae_quality.main()
        return capsys.readouterr().out

    return run


def test_more_training_leaves_less_unexplained(bench):
    few, many = (json.loads(bench("--json", "--steps", steps)) for steps in ("2", "200"))
    assert set(many) == {"steerlora"}
    for short, long in zip(few["steerlora"], many["steerlora"], strict=True):
        assert long["fvu"] < 0.1 < short["fvu"]
        assert 0 <= long["dead"] < 1
        assert long["seconds"] > short["seconds"] > 0
    assert many["steerlora"][0]["fvu"] != many["steerlora"][1]["fvu"]


def test_without_json_it_is_a_table(bench):
    printed = bench("--steps", "2")
    assert "256 tokens, 16 latents, k 4" in printed
    assert "steerlora" in printed


def test_a_folder_without_activations_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_sae_quality.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        bench_sae_quality.main()
    assert ended.value.code == 2
    assert "harvest them" in capsys.readouterr().err
