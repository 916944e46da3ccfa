"""What runs leave in W&B, read back from the offline files: no account, no network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.experiments import TINY
from helpers.offline import OfflineRun, read_runs

from steerlora.cli import compose
from steerlora.config import LoggerConfig
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.manifests import CHECKPOINTS
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.engine.steps import Context, Step
from steerlora.evaluation.records import (
    FILES,
    Ablation,
    DomainSequence,
    Evaluation,
    read_record,
)
from steerlora.reporting import runs
from steerlora.stages import (
    adapter_training,
    base,
    causal_ablation,
    common,
    evaluate,
    sae_training,
    sequential_forgetting,
)


class Logged(NamedTuple):
    """A stage's run, and what it is of."""

    run: OfflineRun
    step: Step
    artifact: Artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def logged(folder, tmp_path_factory) -> dict[str, Logged]:
    """One run of every stage that logs."""
    config = compose.load(
        [
            *(text for text in TINY if text != "logger=none"),
            *(f"logger.dir={folder}", "logger.tags=[trial]", "method=sc_lora"),
            *("order.steps_per_domain=10", "trainer.max_steps=10", "model.steps=10"),
            *("sae.steps=10", "study.interventions=[shuffle]"),
        ]
    )
    asked = (causal_ablation.step(config), sequential_forgetting.step(config))
    report = run(asked, ArtifactStore(tmp_path_factory.mktemp("logged")))
    steps = {
        "base": base.step(config),
        "sae_training": sae_training.steps(config)[0],
        "adapter_training": adapter_training.step(config),
        "evaluate": evaluate.step(config, targets=True),
        "causal_ablation": asked[0],
        "sequential_forgetting": asked[1],
    }
    found = {one.config["fingerprint"]: one for one in read_runs(folder)}
    return {
        stage: Logged(found[step.fingerprint], step, report[step]) for stage, step in steps.items()
    }


def test_every_run_has_the_same_keys_of_the_same_types(logged):
    types = {}
    for stage, (found, step, _) in logged.items():
        assert (found.group, found.code) == ("smoke", 0)
        assert {"trial", stage, "micro_xs"} <= found.tags
        config = found.config
        assert config["fingerprint"] == step.fingerprint
        assert (config["experiment"], config["stage"], config["reused"]) == ("smoke", stage, False)
        assert config["code.version"]
        of_method = {"method.rank", "sae.k", "trainer.learning_rate", "seed"}
        assert "model.layers" in config
        assert of_method <= {*config} or stage in ("base", "sae_training")
        for key, value in config.items():
            if key != "_wandb":
                assert types.setdefault(key, type(value)) in (bool, int, float, str)
                assert type(value) is types[key], key
    shared = set.intersection(*({*found.config} for found, _, _ in logged.values()))
    values = [{key: found.config[key] for key in shared} for found, _, _ in logged.values()]
    differ = {key for key in shared if len({str(one[key]) for one in values}) > 1}
    assert {key for key in differ if not key.startswith("upstream.")} == {
        *("stage", "fingerprint", "sae.architecture", "method.name", "order.name")
    }


def test_figures_have_one_name_in_every_stage(logged):
    scored, _, artifact = logged["evaluate"]
    record = read_record(artifact / evaluate.SCORES, Evaluation)
    for domain, task in record.target_tasks.items():
        assert scored.summary[f"target/{domain}"] == record.tasks[task].value
    assert scored.summary["average/target"] == record.averages["target"].value
    assert [row["task"] for row in scored.table("scores")] == [*record.tasks]
    assert {row["domain"] for row in scored.table("routing")} == {*record.domains}
    sequence, _, artifact = logged["sequential_forgetting"]
    record = read_record(artifact / sequential_forgetting.RESULT, DomainSequence)
    assert sequence.summary["forgetting/positive_mean"] == record.metrics["positive_forgetting"]
    assert sequence.summary["forgetting/final_average"] == record.metrics["final_average"]
    assert {"target/law", "average/target", "average/general_knowledge"} <= {*sequence.summary}
    matrix = [[row[name] for name in record.domains] for row in sequence.table("forgetting_matrix")]
    assert matrix == record.matrix
    trained, _, _ = logged["adapter_training"]
    assert trained.summary["throughput/tokens_per_second"] > 0


def test_steps_and_tokens_go_on_through_a_sequence(logged):
    sequence, _, _ = logged["sequential_forgetting"]
    training = [row for row in sequence.history if "train/loss" in row]
    assert [row["step"] for row in training] == [10 * domain + 9 for domain in range(5)]
    tokens = [row["tokens"] for row in training]
    assert tokens == sorted(set(tokens))
    stages = [row["sequence/stage"] for row in sequence.history if "sequence/stage" in row]
    assert stages == [1, 2, 3, 4, 5]
    for found, _, _ in logged.values():
        assert found.axes["train/*"] == "tokens"
        assert found.axes["sequence/*"] == "sequence/stage"
        assert {"target/*", "average/*", "drop_pct/*", "forgetting/*"} <= {*found.axes}


def test_runs_use_and_make_artifacts_by_fingerprint(logged):
    for stage, (found, step, artifact) in logged.items():
        assert found.made == {(stage, step.fingerprint)}
        assert found.used == {(one.stage, one.fingerprint) for one in step.upstream}
        assert artifact.path.as_uri() in found.references


def test_an_ablation_has_drops_with_their_intervals(logged):
    found, _, artifact = logged["causal_ablation"]
    record = read_record(artifact / causal_ablation.RESULT, Ablation)
    rows = found.table("drops")
    assert {row["intervention"] for row in rows} == {"intact", "shuffle"}
    for row in rows:
        score = record.interventions[row["intervention"]][row["domain"]]
        assert row["score"] == score.value
        name = f"drop_pct/shuffle/{row['domain']}"
        if row["intact"] > 0 and row["intervention"] == "shuffle":
            expected = 100 * (row["intact"] - row["score"]) / row["intact"]
            assert row["drop_pct"] == pytest.approx(expected)
            assert found.summary[name] == row["drop_pct"]
            assert found.summary[f"{name}_low"] <= row["drop_pct"] <= found.summary[f"{name}_high"]
        else:
            assert row["drop_pct"] is None


def test_a_reused_score_is_a_light_run_with_the_same_figures(logged, tmp_path):
    original, step, artifact = logged["evaluate"]
    runs.log_reused(artifact, step.config.logger.__class__(dir=str(tmp_path), group="a sweep"))
    (light,) = read_runs(tmp_path)
    assert (light.group, light.stage, light.code) == ("a sweep", "evaluate", 0)
    assert light.config["reused"] is True
    assert "reused" in light.tags
    assert light.made == set()
    assert light.used == original.used | {("evaluate", step.fingerprint)}
    figures = {name for name in original.summary if name.startswith(("target/", "average/"))}
    assert len(figures) == 20
    assert all(light.summary[name] == original.summary[name] for name in figures)
    assert light.table("scores") == original.table("scores")
    changed = {key for key in light.config if light.config[key] != original.config[key]}
    assert changed - {"_wandb"} == {"reused", "experiment"}


def test_the_files_of_records_are_those_that_stages_write(logged):
    written = {
        evaluate.SCORES: Evaluation,
        causal_ablation.RESULT: Ablation,
        sequential_forgetting.RESULT: DomainSequence,
    }
    assert written == FILES


def test_a_stage_keeps_the_id_of_its_run_among_its_checkpoints(monkeypatch, tmp_path):
    """What an interrupted build leaves, and a finished one does not."""
    given = {}
    monkeypatch.setattr(common, "follow", lambda *_, **options: given.update(options))
    about = {"config": {}, "inputs": {}, "label": "base", "fingerprint": "f", "asked_for": True}
    folders = {"directory": tmp_path / "base/f.partial", "home": tmp_path / "base/f"}
    context = Context(**about, **folders, progress=SilentProgress())
    common.run_log(context, LoggerConfig())
    assert given["asked_for"]
    assert given["id_file"].parent == context.directory / CHECKPOINTS
