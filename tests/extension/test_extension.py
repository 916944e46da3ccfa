"""What docs/extending.md shows, run by configuration alone: a toy of each kind.

The modules beside this file are the toys; none of them is named anywhere in the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from helpers.experiments import TINY

from steerlora.__main__ import main
from steerlora.engine.inventory import listing


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("extension")


@pytest.fixture
def run(root):
    """``run("stage=evaluate", ...)``: the folder of the newest artifact of that stage."""

    def run(*overrides: str) -> Path:
        before = {(info.stage, info.fingerprint) for info in listing(root / "artifacts")}
        main([*TINY, f"artifacts.root={root / 'artifacts'}", *overrides])
        stage = overrides[0].removeprefix("stage=")
        (made,) = [
            info
            for info in listing(root / "artifacts")
            if info.stage == stage and (info.stage, info.fingerprint) not in before
        ]
        return root / "artifacts" / made.stage / made.fingerprint

    return run


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


METHODS = [
    pytest.param("stream_bias", "plugins=[stream_bias]", [], id="method"),
    pytest.param("first_latent_lora", "plugins=[first_latent]", ["1"], id="router"),
    pytest.param("sc_lora", "plugins=[threshold] sae=threshold", ["1"], id="sae"),
]


@pytest.mark.parametrize(("name", "plugin", "sites"), METHODS)
def test_it_trains_is_evaluated_and_goes_through_a_sequence(name, plugin, sites, run):
    chosen = [f"method={name}", *plugin.split()]
    scores = result(run("stage=evaluate", *chosen), "scores.json")
    assert scores["method"] == name
    assert len(scores["tasks"]) == 9
    assert list(scores["routing_by_site"]) == sites
    sequence = result(run("stage=sequential_forgetting", *chosen), "sequential.json")
    assert len(sequence["matrix"]) == 6


@pytest.mark.parametrize(("name", "plugin", "sites"), METHODS)
def test_it_has_a_plan(name, plugin, sites, capsys):
    main([*TINY, "stage=plan", f"method={name}", *plugin.split()])
    printed = capsys.readouterr().out
    assert f"{name}, which trains" in printed
    assert "peak" in printed


def test_an_intervention_is_in_the_ablation_and_trains(run):
    chosen = ("method=sc_lora", "plugins=[scale_signal]", "study.interventions=[scale_signal]")
    ablation = result(run("stage=causal_ablation", *chosen), "ablation.json")
    assert list(ablation["interventions"]) == ["intact", "scale_signal"]
    under = ("intervention=scale_signal", "intervention.phase=training")
    scores = result(run("stage=evaluate", *chosen, *under), "scores.json")
    assert (scores["intervention"], scores["phase"]) == ("scale_signal", "training")


def test_an_analysis_reads_several_methods_and_writes_a_table_and_a_figure(run):
    folder = run(
        "stage=update_norms",
        "plugins=[update_norms,stream_bias]",
        "stage.settings.methods=[lora,stream_bias]",
    )
    table = pd.read_csv(folder / "norms.csv", index_col=0)
    assert list(table.index) == ["lora", "stream_bias"]
    assert (table["norm"] > 0).all()
    assert (folder / "norms.png").stat().st_size > 1000


def test_a_report_shows_them_beside_the_others(root):
    main(
        [
            *TINY,
            f"artifacts.root={root / 'artifacts'}",
            f"results.dir={root / 'results'}",
            "plugins=[stream_bias,scale_signal]",
            "study.methods=[lora,sc_lora,stream_bias]",
            "study.sequential_methods=[lora,stream_bias]",
            "study.interventions=[scale_signal]",
        ]
    )
    for table, named in {
        "scale.csv": "stream_bias",
        "forgetting.csv": "stream_bias",
        "ablation.csv": "scale_signal",
    }.items():
        assert named in (root / "results" / table).read_text()


def test_a_plugin_of_the_current_folder_reaches_the_jobs_of_a_launcher(root, monkeypatch):
    """A job whose method nothing in it had registered would fail."""
    monkeypatch.chdir(Path(__file__).parent)
    roots = ",".join(str(root / name) for name in ("one", "other"))
    asked = ("stage=status", f"artifacts.root={roots}", f"hydra.sweep.dir={root / 'sweep'}")
    method = ("method=stream_bias", "plugins=[stream_bias]")
    with pytest.raises(SystemExit) as ended:
        main(["-m", *TINY, "hydra/launcher=submitit_local", *asked, *method])
    assert ended.value.code == 0
    said = [path.read_text() for path in root.glob("sweep/logs/*/*_log.out")]
    assert ["0 artifacts" in text for text in said] == [True, True]
