"""The bench runs, at sizes at which its figures mean nothing, and says what it promises to say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import bench_adapter
import pytest
import torch

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


@pytest.fixture
def bench(monkeypatch, capsys) -> Callable[..., str]:
    """``bench(...)``: what the script prints with these arguments, in this process."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the threads are all tests'

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench_adapter.py", *SIZES, *arguments])
        bench_adapter.main()
        return capsys.readouterr().out

    return run


def test_json_has_every_ratio_and_every_figure_of_every_contender(bench):
    found = json.loads(bench("--json"))
    targets = {
        "sc_lora_over_peft_same_layers": "at most 1.05",
        "sc_lora_over_peft_all_layers": "at most 0.95",
        "stan_over_peft_same_layers": "at most 1.05",
        "stan_wide_gathered_over_stan_wide_masked": "at most 1.0",
        "sc_lora_all_losses_over_sc_lora": "at most 2.2",
        "published_over_sc_lora_reference": "at least 1.5",
        "published_relu_over_sc_lora_reference_relu": "at least 1",
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
        "sc_lora_reference_relu",
        "published_relu",
        "sc_lora_reference_losses",
        "stan",
        "stan_wide_masked",
        "stan_wide_gathered",
        "peft_same_layers",
        "peft_all_layers",
    }
    for name, figures in contenders.items():
        assert figures["steps"] == (2 if "published" in name or "reference" in name else 4)
        assert figures["tokens_per_second"] > 0
        assert isinstance(figures["peak_memory_bytes"], int)  # too little to be told from zero
        assert figures["step_seconds"]["min"] > 0
    said = {name: figures["what"] for name, figures in contenders.items()}
    assert said["sc_lora"] == said["sc_lora_reference"] == said["published"] == "TopK, task loss"
    assert said["sc_lora_reference_relu"] == said["published_relu"] == "ReLU, task loss"
    assert said["sc_lora_reference_losses"] == "ReLU, all seven losses as published"
    assert said["sc_lora_all_losses"] == "TopK, all seven losses in our form"
    # The same equations in two arrangements, and the same adapter under two losses.
    assert contenders["published"]["parameters"] == contenders["sc_lora_reference"]["parameters"]
    assert contenders["sc_lora"]["parameters"] == contenders["sc_lora_all_losses"]["parameters"]
    # As many units as PEFT's rank are as many parameters.
    assert contenders["stan"]["parameters"] == contenders["peft_same_layers"]["parameters"]
    ratio = contenders["published"]["parameters"] / contenders["sc_lora"]["parameters"]
    assert found["published_over_sc_lora_parameters"]["median"] == pytest.approx(ratio)


def test_the_table_shows_what_was_chosen_and_whether_the_target_is_met(bench, monkeypatch):
    # Memory takes processes of their own.
    monkeypatch.setattr(bench_adapter, "_in_a_process_of_its_own", lambda *_: 0)
    shown = bench("--contenders", "sc_lora", "peft_all_layers")
    assert "published" not in shown
    row = next(line for line in shown.splitlines() if "sc_lora_over_peft_all_layers" in line)
    assert "at most 0.95" in row
    contender = next(line for line in shown.splitlines() if "│ sc_lora " in line)
    assert "TopK, task loss" in contender
    assert row.rstrip(" │").endswith(("yes", "no"))
