"""The bench runs, at sizes at which its figures mean nothing, and says what it promises to say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import bench_sae
import pytest

SIZES = ["16x8x64", "24x12x32"]


@pytest.fixture
def bench(monkeypatch, capsys) -> Callable[..., str]:
    """``bench(...)``: what the script prints with these arguments, in this process."""
    monkeypatch.setattr(bench_sae, "memory_in_a_process_of_its_own", bench_sae.memory_above_kept)
    monkeypatch.setattr(bench_sae, "installed", lambda name: name == "bound")

    def run(*arguments: str) -> str:
        sizes = ["--sizes", *SIZES, "--k", "4", "--repetitions", "3", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["bench_sae.py", *sizes, *arguments])
        bench_sae.main()
        return capsys.readouterr().out

    return run


def test_json_has_a_ratio_and_a_memory_of_every_contender_that_is_there(bench):
    found = json.loads(bench("--json"))
    assert list(found) == SIZES
    for figures in found.values():
        assert set(figures) == {"ours_ms", "ours_over", "memory_mib"}
        assert figures["ours_ms"] > 0
        assert set(figures["ours_over"]) == {"bound"}
        spread = figures["ours_over"]["bound"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert set(figures["memory_mib"]) == {"ours", "bound"}
        assert all(memory >= 0 for memory in figures["memory_mib"].values())


def test_without_json_it_is_a_table_a_size(bench):
    printed = bench()
    assert all(size in printed for size in SIZES)


@pytest.mark.parametrize("size", ["4096", "8x8", "8x8x0", "8x8x8x8", "a x b x c"])
def test_a_mistaken_size_is_one_line(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_sae.py", "--sizes", size])
    with pytest.raises(SystemExit) as ended:
        bench_sae.main()
    assert ended.value.code == 2
    assert f"'{size}': give tokens x width x latents" in capsys.readouterr().err
