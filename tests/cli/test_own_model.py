"""A base model of one's own in experiments and sweeps: an option, one in a folder, or a path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.experiments import TINY

from steerlora.__main__ import main
from steerlora.cli import compose, experiment
from steerlora.cli.command_line import CommandLine
from steerlora.errors import UserError
from steerlora.evaluation.records import BASE

MICRO = ("experiment=micro", "study.seeds=[0]", "study.sequential_methods=[]")


def planned(*overrides: str) -> experiment.Plan:
    return experiment.plan(compose.load(overrides), compose.variant_of(overrides))


def models(plan: experiment.Plan) -> dict[str, set[str]]:
    """{model: the methods that are scored on it}, by the names that records will have."""
    found: dict[str, set[str]] = {}
    for one in (*plan.evaluations, *plan.ablations):
        config = one.step.config
        found.setdefault(config.model, set()).add(config.method)
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    """Options of the user's own: a model, and one whose file has another name than it."""
    options = tmp_path / "mine/model"
    options.mkdir(parents=True)
    text = "defaults: [micro_xs, _self_]\n"
    (options / "small.yaml").write_text(f"{text}name: small\nsteps: 2\n")
    (options / "other.yaml").write_text(f"{text}name: another\n")
    return tmp_path / "mine"


@pytest.mark.parametrize(
    "own", ["model=qwen3_0.6b", "model.name=mine", "model.name=mine study.models=[micro_m,mine]"]
)
def test_the_main_model_is_the_one_that_model_gives(own):
    first, *more = own.split()
    name = first.partition("=")[2]
    config = compose.load([*MICRO, first])
    assert config.study.main_model == config.model.name == name
    plan = planned(*MICRO, first, *more)
    assert models(plan) == {name: {BASE, "lora", "moe_lora", "sc_lora"}}
    assert plan.left_out == (("micro_m",) if more else ("micro_s", "micro_m", "micro_l"))


def test_a_model_of_the_study_can_be_its_main_one():
    plan = planned(*MICRO, "model=micro_s")
    every = {BASE, "lora", "moe_lora", "sc_lora"}
    assert models(plan) == {
        "micro_s": every,
        "micro_m": {BASE, "sc_lora"},
        "micro_l": {BASE, "sc_lora"},
    }
    assert plan.left_out == ()
    assert models(planned(*MICRO, "study.main_model=micro_s")) == models(plan)


@pytest.mark.parametrize("name", ["micro_m", "mine"])
def test_a_path_makes_an_experiment_one_of_that_model_alone(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    own = ("model=micro_xs", f"model.path={tmp_path}", f"model.name={name}")
    plan = planned(*MICRO, *own)
    assert models(plan) == {name: {BASE, "lora", "moe_lora", "sc_lora"}}
    bases = {one.step.inputs["base"].fingerprint for one in plan.all}
    assert len(bases) == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.name=x", "method=.*lora would be called x, and experiments tell options apart"),
        ("study.models=[micro_m,other]", "model=other would be called another"),
        ("study.main_model=other", "model=other would be called another"),
    ],
)
def test_names_that_a_report_would_look_for_in_vain_are_refused_before_any_work(
    override, says, folder
):
    with pytest.raises(UserError, match=says):
        planned(*MICRO, override, f"hydra.searchpath=[{folder}]")


def test_a_sweep_has_the_users_folder_in_every_job(folder):
    command = CommandLine.parse(
        ["-m", "experiment=smoke", "model=small,micro_xs", f"--config-dir={folder}"]
    )
    for job, name in zip(command.jobs, ("small", "micro_xs"), strict=True):
        plan = experiment.plan(compose.load(job), compose.variant_of(job))
        assert set(models(plan)) == {name}


@pytest.mark.long
def test_a_sweep_over_an_experiment_reports_on_the_users_model(folder, tmp_path):
    """The whole command: composed, checked, built by its job, and every figure under the name."""
    few = ("study.methods=[lora,sc_lora]", "study.interventions=[]", "study.sequential_methods=[]")
    places = (f"artifacts.root={tmp_path / 'artifacts'}", f"results.dir={tmp_path / 'results'}")
    with pytest.raises(SystemExit) as ended:
        main(["-m", *TINY[:1], *TINY[2:], *few, *places, "model=small", f"--config-dir={folder}"])
    assert ended.value.code == 0
    claims = json.loads((tmp_path / "results/claims.json").read_text())["claims"]
    figures = {claim["id"]: claim["ours"]["value"] for claim in claims}
    assert figures["C3"] is not None  # the tiny evaluation has no tasks of the others
    rows = (tmp_path / "results/scale.csv").read_text().splitlines()[1:]
    assert rows
    assert all(row.startswith("small,") for row in rows)
