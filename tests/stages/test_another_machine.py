"""The smoke experiment on another machine, which is this one under another instruction set."""

from __future__ import annotations

import json
import os
import shutil

import another_machine
import pytest

from steerlora.engine.inventory import listing
from steerlora.engine.machine import LIMITS, supported, this_machine

SLICE = ("study.methods=[sc_lora]", "study.sequential_methods=[]", "study.interventions=[]")


@pytest.fixture(scope="module")
def rerun(smoke, tmp_path_factory):
    """The instruction set, the results under it, and the script's exit code."""
    here = this_machine().instructions
    others = [name for name in supported() if name.upper() != here]
    instructions = others[-1] if others else "default"
    out = tmp_path_factory.mktemp("rerun") / "smoke"
    command = ["--instructions", instructions, *smoke.overrides, *SLICE, "--out", str(out)]
    return instructions, out, another_machine.main(command)


def test_the_child_ran_under_the_other_instruction_set(smoke, rerun):
    instructions, out, code = rerun
    built = listing(smoke.root / instructions)
    assert {"base", "sae_training", "adapter_training", "evaluate"} <= {i.stage for i in built}
    inherited = {name: os.environ[name] for name in LIMITS if name in os.environ}
    settings = inherited | another_machine.SETTINGS[instructions]
    for info in built:
        assert info.state == "complete"
        assert info.machine.instructions == instructions.upper()
        assert set(info.machine.limits) == {f"{name}={value}" for name, value in settings.items()}
    assert {info.machine.instructions for info in listing(smoke.root)} == {
        this_machine().instructions
    }
    theirs = json.loads((out / "provenance.json").read_text())
    (entry,) = theirs["built_by"]
    assert entry["machine"]["instructions"] == theirs["machine"]["instructions"]
    assert entry["machine"]["instructions"] == instructions.upper()
    assert sorted(entry["artifacts"]) == sorted(info.fingerprint for info in built)
    found = json.loads((out / "comparison.json").read_text())
    assert code == (0 if found["agree"] else 1)
    assert found["first"]["folder"] == str(smoke.results)
    assert found["second"]["built_by"].startswith(f"{instructions.upper()}, ")
    assert found["tables"]["scale"]


def test_fingerprints_are_those_of_this_machine(smoke, rerun):
    instructions, _, _ = rerun
    ours = {(info.stage, info.fingerprint) for info in listing(smoke.root)}
    assert {(info.stage, info.fingerprint) for info in listing(smoke.root / instructions)} <= ours


def test_a_doctored_result_is_found(smoke, rerun, tmp_path, capsys):
    _, out, _ = rerun

    def doctored(folder, name: str, value: float, verdict: str) -> str:
        """A copy in which the first measured claim has two replicates and these figures."""
        shutil.copytree(folder, tmp_path / name)
        document = json.loads((folder / "claims.json").read_text())
        claim = next(claim for claim in document["claims"] if claim["measures"])
        claim["verdict"] = verdict
        for measure in claim["measures"]:
            measure |= {"value": value, "low": value - 0.1, "high": value + 0.1, "seeds": 2}
        (tmp_path / name / "claims.json").write_text(json.dumps(document))
        return str(tmp_path / name)

    committed = doctored(smoke.results, "committed", 0.5, "in range")
    same = doctored(out, "same", 0.5, "in range")
    far = doctored(out, "far", 50, "in range")
    contrary = doctored(out, "contrary", 0.5, "not reproduced")
    assert another_machine.main(["--compare", committed, same]) == 0
    assert another_machine.main(["--compare", committed, far]) == 1
    assert "and 50.000 [49.900, 50.100] do not fit" in capsys.readouterr().out
    assert another_machine.main(["--compare", committed, contrary]) == 1
    assert "in range in the first, not reproduced in the second" in capsys.readouterr().out
