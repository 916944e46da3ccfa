"""What the script refuses, what it compares without a run, and how its child ends.

The run itself: ``tests/stages/test_another_machine.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import another_machine
import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def results(folder: Path, value: float, verdict: str = "in range") -> Path:
    """A results folder with one claim."""
    folder.mkdir()
    numbers = {"value": value, "low": value - 0.1, "high": value + 0.1, "seeds": 3, "items": 200}
    claim = {"id": "C1", "verdict": verdict, "measures": [{"label": "m", **numbers}]}
    document = {"name": "x", "meaningful": True, "claims": [claim]}
    (folder / "claims.json").write_text(json.dumps(document))
    return folder


def test_the_committed_results_of_two_instruction_sets_agree(tmp_path):
    """The command of docs/trust.md; what it writes is what is committed."""
    second = shutil.copytree(ROOT / "results/micro_avx2", tmp_path / "second")
    (second / "comparison.json").unlink()
    assert another_machine.main(["--compare", str(ROOT / "results/micro"), str(second)]) == 0
    said, committed = (
        json.loads((folder / "comparison.json").read_text())
        for folder in (second, ROOT / "results/micro_avx2")
    )
    assert said["claims"] == committed["claims"]
    built = {said[which]["built_by"].split(",")[0] for which in ("first", "second")}
    assert built == {"AVX512", "AVX2"}


def test_two_results_are_compared_without_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(another_machine, "_run", None)
    first, near = results(tmp_path / "first", 0.5), results(tmp_path / "near", 0.51)
    far, other = results(tmp_path / "far", 5), results(tmp_path / "other", 0.5, "not reproduced")
    assert another_machine.main(["--compare", str(first), str(near)]) == 0
    assert "The results agree" in capsys.readouterr().out
    assert json.loads((near / "comparison.json").read_text())["agree"] is True
    assert another_machine.main(["--compare", str(first), str(far)]) == 1
    assert "0.500 [0.400, 0.600] and 5.000 [4.900, 5.100] do not fit" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "out")]
    assert another_machine.main([*out, "--compare", str(first), str(other)]) == 1
    assert "C1: in range in the first, not reproduced in the second" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.md").is_file()
    assert not (other / "comparison.md").exists()


def test_missing_results_are_named_with_the_command_that_writes_them(tmp_path, capsys):
    run = ["--instructions", "default", "experiment=smoke", "study.orders=[]"]
    missing = tmp_path / "none"
    assert another_machine.main([*run, "--committed", str(missing)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {missing} has no claims.json: "
        f"steerlora experiment=smoke 'study.orders=[]' results.dir={missing} writes it"
    )
    assert another_machine.main(["--compare", str(missing), str(missing)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {missing} has no claims.json: steerlora experiment=... ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=micro_m"], "give an experiment"),
        (["experiment=smoke", "stage=features"], "give an experiment and no stage"),
        (["experiment=smok"], "did you mean 'smoke'"),
    ],
)
def test_a_mistake_is_one_line(overrides, said, capsys):
    assert another_machine.main(["--instructions", "default", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_instruction_set_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    committed = results(tmp_path / "committed", 0.5)
    run = ["experiment=smoke", "--committed", str(committed)]
    monkeypatch.setattr(another_machine, "_run", None)
    monkeypatch.setattr(another_machine, "supported", lambda: ["default", "avx2"])
    assert another_machine.main(["--instructions", "avx512", *run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --instructions avx512: ")
    assert line.endswith(" has default, avx2 only")
    # A torch that was built without it: here, one that is told of another.
    monkeypatch.setitem(another_machine.SETTINGS, "avx2", {"ATEN_CPU_CAPABILITY": "default"})
    assert another_machine.main(["--instructions", "avx2", *run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --instructions avx2: torch answers with DEFAULT"


@pytest.mark.parametrize(("ended", "code"), [(1, 3), (-9, 3), (2, 2), (75, 75), (130, 130)])
def test_a_run_that_did_not_end_is_not_compared(tmp_path, monkeypatch, ended, code):
    committed = results(tmp_path / "committed", 0.5)
    monkeypatch.setattr(another_machine, "_run", lambda *_: ended)
    monkeypatch.setattr(another_machine, "_environment", lambda _: {})
    run = ["experiment=smoke", "--committed", str(committed), "--out", str(tmp_path / "out")]
    assert another_machine.main(["--instructions", "default", *run]) == code
    assert not (tmp_path / "out").exists()


def test_the_child_is_told_to_end_and_waited_for(tmp_path):
    def terminate() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate, daemon=True).start()
    assert another_machine._run(["-c", CHILD, str(tmp_path / "ready")], dict(os.environ)) == 75
    assert signal.getsignal(signal.SIGTERM) is before
