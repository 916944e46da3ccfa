"""The bench runs, at sizes at which its figures mean nothing, and says what it promises to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_adapter
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_adapter.py"
TINY = {
    "layers": 2,
    "width": 64,
    "batch": 2,
    "length": 8,
    "vocabulary": 40,
    "latents": 48,
    "k": 4,
    "rank": 4,
    "warmup": 1,
    "repetitions": 4,
    "threads": 1,
}


SIZES = [part for name, size in TINY.items() for part in (f"--{name}", str(size))]


def test_json_has_every_ratio_and_every_figure_of_every_contender():
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *SIZES, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    targets = {
        "sc_lora_over_peft_same_layers": "at most 1.05",
        "sc_lora_over_peft_all_layers": "at most 0.95",
        "sc_lora_all_losses_over_sc_lora": "at most 2.2",
        "published_over_sc_lora_reference": "at least 1.5",
        "published_over_sc_lora": "at least 6",
        "published_over_sc_lora_parameters": "at least 15",
    }
    assert found["targets"] == targets
    for ratio in targets:
        spread = found[ratio]
        assert set(spread) == {"median", "min", "max"}
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    contenders = found["contenders"]
    assert set(contenders) == {
        "sc_lora",
        "sc_lora_all_losses",
        "sc_lora_reference",
        "published",
        "peft_same_layers",
        "peft_all_layers",
    }
    for name, figures in contenders.items():
        assert figures["steps"] == (2 if name in ("published", "sc_lora_reference") else 4)
        assert figures["tokens_per_second"] > 0
        assert isinstance(figures["peak_memory_bytes"], int)  # too little to be told from zero
        assert figures["step_seconds"]["min"] > 0
    # The same equations in two arrangements, and the same adapter under two losses.
    assert contenders["published"]["parameters"] == contenders["sc_lora_reference"]["parameters"]
    assert contenders["sc_lora"]["parameters"] == contenders["sc_lora_all_losses"]["parameters"]
    ratio = contenders["published"]["parameters"] / contenders["sc_lora"]["parameters"]
    assert found["published_over_sc_lora_parameters"]["median"] == pytest.approx(ratio)


def test_the_table_shows_what_was_chosen_and_whether_the_target_is_met(monkeypatch, capsys):
    chosen = ["--contenders", "sc_lora", "peft_all_layers"]
    monkeypatch.setattr(sys, "argv", ["bench_adapter.py", *SIZES, *chosen])
    # Memory takes processes of their own, and the threads are all tests'.
    monkeypatch.setattr(bench_adapter, "_in_a_process_of_its_own", lambda *_: 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    bench_adapter.main()
    shown = capsys.readouterr().out
    assert "published" not in shown
    row = next(line for line in shown.splitlines() if "sc_lora_over_peft_all_layers" in line)
    assert "at most 0.95" in row
    assert row.rstrip(" │").endswith(("yes", "no"))
