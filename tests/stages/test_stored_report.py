"""``stage=report``: the report on what is stored of an experiment, and what it lacks."""

from __future__ import annotations

import json
import shutil

import pytest

from steerlora.__main__ import main
from steerlora.cli import experiment
from steerlora.engine.artifacts import ArtifactStore

LACKING = {
    "nothing": lambda plan: [],
    "bases": lambda plan: [one for one in plan.evaluations if one.step.label.endswith(" base")],
    "an evaluation": lambda plan: plan.evaluations[-1:],
    "the ablations": lambda plan: plan.ablations,
    "a sequence": lambda plan: plan.sequentials[:1],
    "all but one": lambda plan: plan.all[:-1],
}


@pytest.mark.slow
@pytest.mark.parametrize("lacking", list(LACKING))
def test_a_report_is_of_what_is_there(smoke, tmp_path, capsys, lacking):
    gone = {one.step.fingerprint: one.step for one in LACKING[lacking](smoke.planned)}
    skipped = shutil.ignore_patterns("*.lock", *gone)
    shutil.copytree(smoke.root, tmp_path / "store", ignore=skipped, symlinks=True)
    results = tmp_path / "results"
    place = (f"artifacts.root={tmp_path / 'store'}", f"results.dir={results}")
    main(["stage=report", *smoke.overrides, *place])
    out = " ".join(capsys.readouterr().out.split())
    page = (results / "report.html").read_text()
    for step in gone.values():
        assert f"missing: {step.label}" in out
        assert step.label in page
    assert (f"{len(gone)} missing" if gone else "nothing is missing") in out
    there = set(json.loads((results / "provenance.json").read_text())["artifacts"])
    assert there == {step.fingerprint for step in smoke.planned.steps} - set(gone)
    if not gone:
        for name in ("claims.json", "scale.csv", "forgetting.csv", "ablation.csv"):
            assert (results / name).read_bytes() == (smoke.results / name).read_bytes()
    assert not any((tmp_path / "store" / s.stage / name).exists() for name, s in gone.items())


def test_a_damaged_artifact_is_missing(smoke, tmp_path):
    shutil.copytree(smoke.root, tmp_path / "store")
    step = smoke.planned.ablations[0].step
    next((tmp_path / "store" / step.stage / step.fingerprint).glob("*.json")).write_text("{}")
    store = ArtifactStore(tmp_path / "store")
    artifacts = experiment.stored(smoke.planned, store)
    cells = experiment.missing(smoke.planned, artifacts, smoke.overrides)
    assert [cell.label for cell in cells] == [step.label]
