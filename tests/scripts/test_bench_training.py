"""The bench of whole configurations runs, at a size at which its figures mean nothing."""

from __future__ import annotations

import json
import sys

import bench_training
import pytest

OVERRIDES = [
    *("model=micro_xs", "trainer=cpu", "trainer.batch_size=4", "trainer.max_length=12"),
    *("trainer.accumulate=2", "method.rank=3"),
]


@pytest.fixture
def bench(monkeypatch):
    """``bench(...)``: the script with these arguments, in this process."""
    monkeypatch.setattr(bench_training, "_in_a_process_of_its_own", lambda work, *a: work(*a))

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_training.py", *arguments])
        bench_training.main()

    return run


def test_both_contenders_train_what_was_asked_for(bench, tmp_path, capsys):
    bench("--rounds", "2", "--steps", "3", "--write", str(tmp_path / "new/qwen3_0.6b"), *OVERRIDES)
    assert "times PEFT's step" in capsys.readouterr().out
    assert "MFU" in (tmp_path / "new/qwen3_0.6b/training.txt").read_text()
    found = json.loads((tmp_path / "new/qwen3_0.6b/training.json").read_text())
    assert found["device"] == "CPU"
    assert found["overrides"][:-1] == OVERRIDES
    ours, theirs = (found["contenders"][name] for name in ("steerlora", "peft"))
    for figures in (ours, theirs):
        assert figures["steps"] == 2 * 3
        tokens = figures["tokens_per_second"] * figures["step_seconds"]
        assert tokens == pytest.approx(4 * 12)
        assert figures["mfu"] > 0
    # One layer of two is adapted: the low-rank matrices are as large, and PEFT has no router.
    assert 0 < theirs["parameters"] < ours["parameters"]
    assert len(found["steerlora_over_peft"]["rounds"]) == 2
    assert found["planned_peak_bytes"] > 0


def test_a_mistake_is_one_line(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench(*OVERRIDES, "trainer.batch_size=5")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trainer.batch_size=5: 2 equal parts")
