from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from PIL import Image

from steerlora.reporting.labels import BANNER
from steerlora.reporting.report import FIGURES, write_report

TEXTS = {"claims.md", "claims.json", "provenance.json", "results.md"}
TABLES = {
    f"{name}.{suffix}"
    for name in ("scale", "ablation", "retrained", "forgetting", "order_effects", "method")
    for suffix in ("md", "csv", "tex")
}


def report(directory, methods, world=None, *, meaningful=True, **parts):
    records = {"evaluations": [], "ablations": [], "sequentials": []}
    if world is not None:
        records = {
            "evaluations": [
                *map(world.over_training, world.evaluations(models=("micro_s", "micro_m"))),
                *(world.retrained("shuffle", seed, 0.5) for seed in (0, 1)),
            ],
            "ablations": [world.doses(world.ablation(seed)) for seed in (0, 1)],
            "sequentials": [
                world.general(world.sequential(method, order, 0))
                for method in world.forgetting
                for order in ("broad_first", "broad_last")
            ],
        }
    return write_report(
        directory,
        **(records | parts),
        methods=methods,
        name="demo",
        meaningful=meaningful,
        provenance={"commit": "abc", "versions": {"cuda": "none"}},
        main_model="micro_m",
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory, make_world, methods):
    return report(tmp_path_factory.mktemp("results") / "full", methods, everything(make_world))


def everything(make_world):
    """A world in which every table and figure has records."""
    lost = {"lora": 0.4, "sc_lora_context": 0.05, "sc_lora_context_soft": 0.1}
    return make_world(items=20, forgetting=lost)


def test_everything_is_written_and_parses(full):
    names = {path.name for path in full.directory.iterdir()}
    assert names == {path.name for path in full.files}
    drawn = {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf")}
    assert names == TEXTS | TABLES | drawn
    for name in FIGURES:
        path = full.directory / f"{name}.png"
        with Image.open(path) as image:
            assert 500 <= image.width <= 1400
        assert path.stat().st_size < 300_000
        vector = path.with_suffix(".pdf").read_bytes()
        assert vector.startswith(b"%PDF-")
        assert len(vector) < 100_000
        assert b"/Type3" not in vector  # fonts that publishers refuse
    for name, data in full.tables.items():
        assert len(pd.read_csv(full.directory / f"{name}.csv")) == len(data)
    provenance = json.loads((full.directory / "provenance.json").read_text())
    assert provenance["commit"] == "abc"
    assert provenance["versions"]["cuda"] == "none"
    assert provenance["versions"]["torch"]
    assert "ablation-sc_lora-1" in provenance["artifacts"]
    index = (full.directory / "results.md").read_text()
    for name, caption in FIGURES.items():
        shown = index.split(f"({name}.png)\n\n")[1].split("\n\n")[0]
        assert shown.startswith(caption)
        assert re.search(r"\d replicates? \(seeds? 0.*; [0-9,]+ (items a|tokens)", shown), shown
        assert f"As [PDF]({name}.pdf)." in shown
    assert "## Order effects" in index
    assert "\n- Positive forgetting at most 0.2 of lora's: " in index
    assert BANNER not in index
    assert BANNER not in full.terminal.title
    rows = [1 + len(c.measures) * (len(c.measures) > 1) for c in full.claims]
    assert full.terminal.row_count == sum(rows)


def test_the_same_records_give_the_same_bytes(tmp_path, make_world, full, methods):
    again = report(tmp_path, methods, everything(make_world))
    for one, other in zip(full.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_smoke_run_is_marked_everywhere(tmp_path, make_world, full, methods):
    smoke = report(tmp_path, methods, everything(make_world), meaningful=False)
    for path in smoke.files:
        if path.suffix in (".png", ".pdf"):
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
def test_a_report_of_one_part(tmp_path, make_world, part, tables, methods):
    world = make_world(items=20)
    records = {
        "evaluations": world.evaluations(models=("micro_m",), seeds=(0,)),
        "ablations": [world.ablation(0)],
        "sequentials": [world.sequential("lora", "broad_first", 0)],
    }
    written = report(tmp_path, methods, **{part: records[part]})
    assert set(written.tables) == tables
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written.files}


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without figures, where a test is not about them: drawing is most of the time."""
    monkeypatch.setattr("steerlora.reporting.report._draw", lambda *_: [])


@pytest.mark.usefixtures("undrawn")
def test_controls_are_no_results(tmp_path, make_world, methods):
    """Evaluations under an intervention, at either phase, change nothing but their own table."""
    world = make_world(items=20)
    plain = [world.over_training(record) for record in world.evaluations(models=("micro_m",))]
    controls = [world.retrained("shuffle", seed, 0.1) for seed in (0, 1)]
    for seed in (0, 1):
        shuffled = world.rerouted(world.retrained("shuffle", seed, 0.3), usage_entropy=0.0)
        controls.append(replace(shuffled, phase="evaluation", fingerprint=f"shuffled-{seed}"))
    alone = report(tmp_path / "alone", methods, evaluations=plain)
    mixed = report(tmp_path / "mixed", methods, evaluations=[*controls, *plain])
    assert set(mixed.tables) == {"scale", "retrained"}
    assert mixed.tables["retrained"].retrained.tolist() == [pytest.approx(0.1005)]
    assert mixed.claims == alone.claims
    for path in alone.files:
        if path.suffix == ".csv":
            assert path.read_bytes() == (mixed.directory / path.name).read_bytes(), path.name
    provenance = json.loads((mixed.directory / "provenance.json").read_text())
    assert "shuffled-0" in provenance["artifacts"]


@pytest.mark.usefixtures("undrawn")
def test_runs_with_replay_are_not_averaged_with_those_without(tmp_path, make_world, methods):
    world = make_world(items=20)
    orders = ("broad_first", "broad_last")
    plain = [world.sequential(name, o, 0) for name in ("lora", "sc_lora") for o in orders]
    replayed = [
        replace(world.sequential("sc_lora", o, 0), replay=0.2, fingerprint=f"replayed-{o}")
        for o in orders
    ]
    data = report(tmp_path, methods, sequentials=plain + replayed).tables["forgetting"]
    rows = data[data.order == "all"].set_index("method").runs
    assert rows.to_dict() == {"lora": 2, "sc_lora": 2, "sc_lora replay 0.2": 2}


def test_nothing_of_an_earlier_report_stays(tmp_path, full, methods):
    shutil.copytree(full.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    written = report(tmp_path, methods)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == TEXTS | {"notes.txt"}
    assert {claim.verdict for claim in written.claims} == {"not measured"}


@pytest.mark.usefixtures("undrawn")
def test_scores_that_are_no_accuracies(tmp_path, make_world, methods):
    """Likelihoods above one, negative scores, no routing, no items: reported, not crashed on."""
    world = make_world(items=20)
    ablation = world.ablation(0)

    def below_zero(score):
        items = [item - 3 for item in score.per_item]
        return replace(score, value=score.value - 3, per_item=items)

    ablation = replace(
        ablation,
        interventions={
            name: {domain: below_zero(score) for domain, score in scores.items()}
            for name, scores in ablation.interventions.items()
        },
    )
    evaluations = [
        replace(
            record,
            routing_by_site={},
            averages={"target": record.averages["target"]},
            tasks={task: replace(score, per_item=[]) for task, score in record.tasks.items()},
        )
        for record in world.evaluations(models=("text",), seeds=(0,))
    ]
    written = report(tmp_path, methods, evaluations=evaluations, ablations=[ablation])
    verdicts = {claim.id: claim.verdict for claim in written.claims}
    assert verdicts["C4"] == "not measured"  # a percentage of a negative score means nothing
    assert verdicts["C1"] == "not measured"


@pytest.mark.parametrize(
    ("varied", "sentence"),
    [
        (
            ("base", "sae", "adapter"),
            "A replicate has its own base, SAE and adapter, and order of the data; world and "
            "evaluation items are the same in all.",
        ),
        (
            ("adapter",),
            "A replicate has its own adapter, and order of the data; base, SAE, world and "
            "evaluation items are the same in all.",
        ),
    ],
)
def test_the_report_says_what_a_replicate_is(tmp_path, methods, varied, sentence):
    report(tmp_path, methods, varied=varied)
    assert sentence in (tmp_path / "results.md").read_text()
