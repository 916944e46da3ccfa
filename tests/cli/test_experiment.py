"""What an experiment is made of: replicates, and what of them varies."""

import shlex

import pytest

from steerlora.cli import compose, experiment
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.engine.steps import STAGES, Step, stage
from steerlora.errors import UserError
from steerlora.evaluation.records import BASE
from steerlora.reporting.report import write_parts

SMOKE = ("experiment=smoke", "study.seeds=[4,7]", "study.interventions=[shuffle]")


def planned(*changes: str) -> experiment.Plan:
    overrides = [*SMOKE, *changes]
    return experiment.plan(compose.load(overrides), lambda *more: compose.load([*overrides, *more]))


def upstream(step, stage: str) -> set[str]:
    """Fingerprints of the steps of a stage that a step rests on, itself included."""
    found = {step.fingerprint} if step.stage == stage else set()
    return found.union(*(upstream(other, stage) for other in step.upstream))


def counted(plan: experiment.Plan) -> dict[str, int]:
    """{stage: how many artifacts of it the two ablations rest on}"""
    ablations = [step for step, *_ in plan.ablations]
    assert len(ablations) == 2
    return {
        stage: len(set.union(*(upstream(step, stage) for step in ablations)))
        for stage in ("domains", "base", "sae_training", "adapter_training")
    }


@pytest.mark.parametrize(
    ("vary", "counts"),
    [
        ("[base,sae,adapter]", (1, 2, 2, 2)),
        ("[base]", (1, 2, 2, 2)),  # what is trained on another base is another
        ("[sae]", (1, 1, 2, 2)),
        ("[adapter]", (1, 1, 1, 2)),
    ],
)
def test_a_replicate_makes_anew_what_varies(vary, counts):
    plan = planned(f"study.vary={vary}")
    assert tuple(counted(plan).values()) == counts
    for part in (plan.ablations, plan.sequentials):
        assert {one.replicate for one in part} == {4, 7}


def test_what_does_not_vary_has_the_first_seed():
    for step, *_ in planned("study.vary=[base]").ablations:
        assert step.config.seed == 4
    assert [step.config.seed for step, *_ in planned("study.vary=[adapter]").ablations] == [4, 7]


def test_a_base_and_saes_that_are_given_are_the_same_in_all(tmp_path):
    for name in ("config.json", "cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_text("{}")
    of_sae = counted(planned(f"sae.path={tmp_path}"))
    assert (of_sae["base"], of_sae["sae_training"], of_sae["adapter_training"]) == (2, 2, 2)
    plan = planned("model=micro_xs", f"model.path={tmp_path}", f"sae.path={tmp_path}")
    assert tuple(counted(plan).values()) == (1, 1, 1, 2)
    config = compose.load([*SMOKE, "model=micro_xs", f"model.path={tmp_path}"])
    assert experiment.varied(config) == ["sae", "adapter"]


def test_every_replicate_scores_its_own_base_and_one_that_all_share_is_scored_once():
    def bases(*changes: str) -> list[int]:
        plan = planned(*changes)
        return [p.replicate for p in plan.evaluations if p.step.config.method == BASE]

    assert bases() == [4, 7]
    assert bases("study.vary=[sae,adapter]") == [4]


def test_what_is_missing_comes_with_the_command_that_builds_it():
    """The command asks for the very step, by its fingerprint."""
    given = ["stage=report", *SMOKE, "method.rank=2"]
    plan = planned("method.rank=2")
    kept = plan.ablations[0].step.fingerprint
    cells = experiment.missing(plan, {kept: None}, given)
    steps = {one.step.fingerprint: one for one in plan.all}
    assert len(cells) == len(steps) - 1
    asked = set()
    for cell in cells:
        program, *overrides = shlex.split(cell.command)
        assert program == "steerlora"
        config = compose.load(overrides)
        (step,) = STAGES[config.stage.name].steps(config, None)
        assert step.label == cell.label
        assert ("method.rank=2" in overrides) == (config.method.name != "base")
        asked.add(step.fingerprint)
    assert asked == {*steps} - {kept}


def test_nothing_stored_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match="nothing of this experiment is stored under"):
        experiment.stored(planned(), ArtifactStore(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.vary=[]", "study.vary=\\[\\]: must be a list of one of base, sae, adapter"),
        ("study.vary=[bases]", "study.vary\\[0\\]=bases: did you mean 'base'"),
        ("study.seeds=[1,1]", "study.seeds=\\[1, 1\\]: give each once"),
        ("study.calibrate=[2]", "study.calibrate=\\[2\\]: give numbers from 2 to 1"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        planned(override)


def test_an_experiment_may_be_about_one_stage_which_writes_the_report(tmp_path, monkeypatch):
    seen = {}

    def write(config, artifacts, provenance):
        seen.update(artifacts=artifacts, provenance=provenance)
        return write_parts(
            tmp_path,
            name=config.study.name,
            meaningful=config.study.meaningful,
            claims=(),
            tables=[],
            drawn=[],
            provenance="{}",
        )

    def steps(config):
        return [Step("reported", {"seed": seed}, {}, f"of {seed}") for seed in config.study.seeds]

    monkeypatch.delitem(STAGES._found, "reported", raising=False)
    stage("reported", 1, step=steps, report=write)(lambda context: {"seed": context.config["seed"]})
    root = tmp_path / "artifacts"
    overrides = (*SMOKE, "study.stage=reported", f"artifacts.root={root}", "logger=none")
    plan = planned(*overrides[len(SMOKE) :])
    assert [one.step.config["seed"] for one in plan.staged] == [4, 7]
    assert plan.steps == tuple(one.step for one in plan.staged)
    finished = run(plan.steps[:1], ArtifactStore(root), progress=SilentProgress())
    config = compose.load(overrides)
    absent = experiment.missing(plan, finished.artifacts, overrides)
    written = experiment.report(config, plan, finished.artifacts, absent)
    assert [one.fingerprint for one in seen["artifacts"]] == [plan.steps[0].fingerprint]
    assert seen["provenance"]["experiment"] == "smoke"
    assert (tmp_path / "results.md") in written.files
    assert "of 7" in (tmp_path / "report.html").read_text()
    assert absent[0].command.endswith("stage=reported")


def test_a_stage_without_a_report_is_no_experiments():
    with pytest.raises(UserError, match=r"study.stage=features: it writes no report"):
        planned("study.stage=features")
    with pytest.raises(UserError, match=r"study.stage='?featurs'?.*features"):
        planned("study.stage=featurs")
