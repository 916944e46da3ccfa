from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from PIL import Image

from steerlora.reporting.labels import BANNER
from steerlora.reporting.report import FIGURES, write_report

TEXTS = {"claims.md", "claims.json", "provenance.json", "results.md"}
TABLES = {
    f"{name}.{suffix}"
    for name in ("scale", "ablation", "forgetting")
    for suffix in ("md", "csv", "tex")
}


def report(directory, world=None, *, meaningful=True, **parts):
    records = {"evaluations": [], "ablations": [], "sequentials": []}
    if world is not None:
        records = {
            "evaluations": world.evaluations(models=("micro_s", "micro_m")),
            "ablations": [world.ablation(0), world.ablation(1)],
            "sequentials": [
                world.sequential(adapter, order, 0)
                for adapter in ("lora", "sc_lora")
                for order in ("broad_first", "broad_last")
            ],
        }
    return write_report(
        directory,
        **(records | parts),
        name="demo",
        meaningful=meaningful,
        provenance={"commit": "abc", "versions": {"cuda": "none"}},
        main_model="micro_m",
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory, make_world):
    return report(tmp_path_factory.mktemp("results") / "full", make_world(items=20))


def test_everything_is_written_and_parses(full):
    names = {path.name for path in full.directory.iterdir()}
    assert names == {path.name for path in full.files}
    assert names == TEXTS | TABLES | {f"{name}.png" for name in FIGURES}
    for name in FIGURES:
        path = full.directory / f"{name}.png"
        with Image.open(path) as image:
            assert 700 <= image.width <= 1400
        assert path.stat().st_size < 300_000
    for name, data in full.tables.items():
        assert len(pd.read_csv(full.directory / f"{name}.csv")) == len(data)
    provenance = json.loads((full.directory / "provenance.json").read_text())
    assert provenance["commit"] == "abc"
    assert provenance["versions"]["cuda"] == "none"
    assert provenance["versions"]["torch"]
    assert "ablation-sc_lora-1" in provenance["artifacts"]
    index = (full.directory / "results.md").read_text()
    assert all(f"({name}.png)" in index for name in FIGURES)
    assert BANNER not in index
    assert BANNER not in full.terminal.title
    assert full.terminal.row_count == 8


def test_the_same_records_give_the_same_bytes(tmp_path, make_world, full):
    again = report(tmp_path, make_world(items=20))
    for one, other in zip(full.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_smoke_run_is_marked_everywhere(tmp_path, make_world, full):
    smoke = report(tmp_path, make_world(items=20), meaningful=False)
    for path in smoke.files:
        if path.suffix == ".png":
            assert path.read_bytes() != (full.directory / path.name).read_bytes()
        elif path.name == "provenance.json":
            assert json.loads(path.read_text())["meaningful"] is False
        else:
            assert BANNER in path.read_text().lower(), path.name
    assert BANNER in smoke.terminal.title


@pytest.mark.parametrize(
    ("part", "tables"),
    [("evaluations", {"scale"}), ("ablations", {"ablation"}), ("sequentials", {"forgetting"})],
)
def test_a_report_of_one_part(tmp_path, make_world, part, tables):
    world = make_world(items=20)
    records = {
        "evaluations": world.evaluations(models=("micro_m",), seeds=(0,)),
        "ablations": [world.ablation(0)],
        "sequentials": [world.sequential("lora", "broad_first", 0)],
    }
    written = report(tmp_path, **{part: records[part]})
    assert set(written.tables) == tables
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written.files}


def test_nothing_of_an_earlier_report_stays(tmp_path, full):
    shutil.copytree(full.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    written = report(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == TEXTS | {"notes.txt"}
    assert {claim.verdict for claim in written.claims} == {"not measured"}


def test_scores_that_are_no_accuracies(tmp_path, make_world):
    """Likelihoods above one, negative scores, no routing, no items: reported, not crashed on."""
    world = make_world(items=20)
    ablation = world.ablation(0) | {"score_name": "log-likelihood", "score_unit": "nats"}
    for scores in ablation["interventions"].values():
        for cell in scores.values():
            cell["value"] -= 3
            cell["per_item"] = [score - 3 for score in cell["per_item"]]
    evaluations = world.evaluations(models=("text",), seeds=(0,))
    for record in evaluations:
        record["routing"] = None
        record["averages"] = {"target": record["averages"]["target"]}
        for task in record["tasks"].values():
            task["per_item"] = None
    written = report(tmp_path, evaluations=evaluations, ablations=[ablation])
    verdicts = {claim.id: claim.verdict for claim in written.claims}
    assert verdicts["C4"] == "not measured"  # a percentage of a negative score means nothing
    assert verdicts["C1"] == "not measured"
    assert "log-likelihood (nats)" in (tmp_path / "ablation.md").read_text()
