"""Our scores against lm-eval's own, and our model and tasks behind lm-eval's own entry points."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from functools import partialmethod

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

import steerlora.evaluation.__main__ as command
from steerlora import load_adapter
from steerlora.cli import compose
from steerlora.config import EvaluationConfig
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.evaluation.harness import TASKS, Harness
from steerlora.evaluation.records import Evaluation, read_record
from steerlora.evaluation.scores import Estimate, Score, averages
from steerlora.evaluation.statistics import standard_error
from steerlora.evaluation.suite import Domains, Suite
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.saes.saelens import load_sae, save_sae
from steerlora.stages import adapter_training, evaluate
from steerlora.stages.common import load_base

TINY = (
    "model=micro_xs",
    "model.steps=2",
    "model.batch_size=4",
    "domains.train_items=10",
    "domains.pretrain_items=100",
    "domains.evaluation_items=12",
    "sae.max_tokens=400",
    "sae.steps=2",
    "sae.batch_size=32",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "trainer.learning_rate=0.05",
    "method.rank=2",
    "logger=none",
)


@dataclass(frozen=True)
class Trained:
    """Artifacts of a tiny base and a tiny adapter."""

    domains: Artifact
    base: Artifact
    adapter: Artifact

    @property
    def model_args(self) -> dict[str, str]:
        return {
            "pretrained": str(self.base / "model"),
            "adapter": str(self.adapter / "adapter"),
        }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    step = adapter_training.step(compose.load(TINY))
    report = run([step], ArtifactStore(tmp_path_factory.mktemp("trained")))
    by_stage = {artifact.stage: artifact for artifact in report.artifacts.values()}
    return Trained(by_stage["domains"], by_stage["base"], by_stage["adapter_training"])


@pytest.fixture(scope="module")
def harness(trained) -> Harness:
    return Harness(suite(trained))


def suite(trained, **config) -> Suite:
    return Suite(Domains.read(trained.domains.path), EvaluationConfig(**{"limit": 8} | config))


def simple_evaluate(trained: Trained, tasks: list[str], **model_args) -> dict:
    """lm-eval's own entry point with our model, by name."""
    return lm_eval.simple_evaluate(
        model="steerlora",
        model_args=trained.model_args | {"max_length": 256} | model_args,
        tasks=tasks,
        task_manager=TaskManager(
            include_path=str(TASKS / "micro"),
            include_defaults=False,
            metadata={"domains_dir": str(trained.domains.path)},
        ),
        apply_chat_template=True,
        bootstrap_iters=0,
        batch_size=8,
        device="cpu",
        limit=8,
    )


def test_our_scores_are_lm_evals(trained, harness):
    tasks = ["micro_mmlu", "micro_law", "micro_ifeval"]
    model, tokenizer = load_base(trained.base)
    load_adapter(model, trained.adapter / "adapter")
    ours = harness.run(model, tokenizer, tasks, batch_size=8, max_length=256)
    theirs = simple_evaluate(trained, tasks)
    for task in tasks:
        score, results = ours[task], theirs["results"][task]
        assert score.metric == harness.suite.metrics[task]
        assert score.value == results[score.metric]
        assert score.others == {
            name: value
            for name, value in results.items()
            if isinstance(value, float) and "stderr" not in name and name != score.metric
        }
        assert score.items == len(score.per_item) == 8
        assert score.value == pytest.approx(sum(score.per_item) / 8)
        assert score.stderr == standard_error(score.per_item)
        assert score.version == str(theirs["versions"][task]) == "1"
    assert ours["micro_mmlu"].stderr == pytest.approx(
        lm_eval.api.metrics.mean_stderr(ours["micro_mmlu"].per_item)
    )


def test_every_task_of_the_domains_is_found(harness):
    assert len(harness.suite.tasks) == 9
    assert set(harness.suite.tasks) <= set(harness.manager.all_tasks)
    assert set(harness.suite.metrics) >= set(harness.suite.tasks)


def test_an_unknown_task_is_refused_with_the_nearest(trained, harness):
    model, tokenizer = load_base(trained.base)
    with pytest.raises(UserError, match="no lm-eval task micro_maths: did you mean 'micro_math'"):
        harness.run(model, tokenizer, ["micro_maths"], batch_size=8, max_length=64)


def test_scores_do_not_depend_on_the_batch_size(trained, harness):
    model, tokenizer = load_base(trained.base)
    load_adapter(model, trained.adapter / "adapter")
    tasks = ["micro_mmlu", "micro_math"]
    one, many = (
        harness.run(model, tokenizer, tasks, batch_size=size, max_length=256) for size in (1, 6)
    )
    assert {name: score.per_item for name, score in one.items()} == {
        name: score.per_item for name, score in many.items()
    }


def test_an_intervention_acts_by_name_during_every_request(trained, monkeypatch):
    asked = []
    original = Adapter.intervention

    def spy(self, name, **kwargs):
        asked.append((name, kwargs["seed"], kwargs["domain"]))
        return original(self, name, **kwargs)

    monkeypatch.setattr(Adapter, "intervention", spy)
    controlled = {"intervention": "oracle_domain", "intervention_domain": "law"}
    simple_evaluate(trained, ["micro_mmlu", "micro_law"], intervention_seed=3, **controlled)
    assert asked == [("oracle_domain", 3, "law")] * 2  # likelihoods, generation


def test_an_intervention_changes_what_lm_eval_sees(trained):
    def likelihoods(**model_args) -> list:
        samples = simple_evaluate(trained, ["micro_mmlu"], **model_args)["samples"]["micro_mmlu"]
        return [response[0] for sample in samples for response in sample["filtered_resps"]]

    intact = likelihoods()
    assert likelihoods() == intact
    assert likelihoods(intervention="uniform_gate") != intact
    assert likelihoods(intervention="uniform_gate", intervention_strength=0.0) == intact


def test_an_intervention_without_an_adapter_is_refused(trained):
    with pytest.raises(UserError, match="intervention=invert needs adapter=<folder>"):
        simple_evaluate(trained, ["micro_mmlu"], adapter=None, intervention="invert")


def test_a_retrained_control_is_not_scored_without_its_control_unasked(trained, tmp_path):
    adapter = shutil.copytree(trained.model_args["adapter"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trained_under"] == "none"
    config["saes"][0]["path"] = None
    config["trained_under"] = "shuffle"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    sae = next(trained.base.path.parent.parent.glob("sae_training/*/sae"))
    given = {"adapter": adapter, "sae": sae}
    with pytest.raises(UserError, match=r"trained under .*: pass intervention=shuffle, or .*=none"):
        simple_evaluate(trained, ["micro_mmlu"], **given)
    simple_evaluate(trained, ["micro_mmlu"], intervention="none", **given)


def test_the_evaluate_stage_applies_its_intervention(trained, tmp_path, monkeypatch):
    asked = []
    original = Adapter.intervention
    monkeypatch.setattr(
        Adapter,
        "intervention",
        lambda self, name, **kwargs: asked.append(name) or original(self, name, **kwargs),
    )
    config = compose.load([*TINY, "intervention=shuffle", "evaluation.tasks=[micro_law]"])
    step = evaluate.step(config)
    artifact = run([step], ArtifactStore(trained.base.path.parent.parent))[step]
    assert asked == ["shuffle"]
    record = read_record(artifact / evaluate.SCORES, Evaluation)
    assert record.intervention == "shuffle"
    assert list(record.tasks) == ["micro_law"]


def run_command(trained: Trained, **changes) -> list[str]:
    model_args = ",".join(f"{k}={v}" for k, v in (trained.model_args | changes).items())
    return [
        *("run", "--model", "steerlora", "--model_args", model_args),
        *("--tasks", "micro_law,micro_mmlu", "--limit", "4", "--device", "cpu"),
        "--apply_chat_template",
        *("--metadata", json.dumps({"domains_dir": str(trained.domains.path)})),
    ]


@pytest.fixture
def own_argv(monkeypatch) -> None:
    """What lm-eval's command line changes in its process, changed back.

    It knows our tasks alone: to read lm-eval's own takes longer than the rest of a test.
    """
    monkeypatch.setattr(sys, "argv", ["steerlora.evaluation"])
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", True)  # this test's streams close
    ours = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", ours)


@pytest.mark.usefixtures("own_argv")
def test_lm_evals_command_line_runs_our_model_on_our_tasks(trained, tmp_path, capsys):
    """In this process; the README's test starts one."""
    command.main([*run_command(trained, intervention="shuffle"), "--output_path", str(tmp_path)])
    assert "micro_law" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert set(results["results"]) == {"micro_law", "micro_mmlu"}
    assert results["config"]["model"] == "steerlora"


@pytest.mark.usefixtures("own_argv")
def test_a_mistake_on_lm_evals_command_line_is_one_line(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(run_command(trained, adapter=str(tmp_path)))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "is no adapter: adapter_config.json is missing" in line
    assert "Traceback" not in err


@pytest.mark.usefixtures("own_argv")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num_fewshot", "2"], "--num_fewshot 2: micro_law has no examples"),
        (["--cache_requests", "true"], "--cache_requests: lm-eval knows what it kept of micro_law"),
        (["--cache_requests"], "--cache_requests: lm-eval knows what it kept of micro_law"),
    ],
)
def test_an_option_that_lm_eval_would_ignore_or_mix_up_is_refused(options, says, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["run", "--model", "steerlora", "--tasks", "micro_law,micro_mmlu", *options])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_an_unknown_intervention_is_refused_with_the_nearest(trained):
    with pytest.raises(UserError, match="intervention=shufle: did you mean 'shuffle'"):
        simple_evaluate(trained, ["micro_law"], intervention="shufle")


def test_an_adapter_of_another_base_is_refused(trained, tmp_path):
    model, tokenizer = load_base(trained.base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="trained on another base model"):
        simple_evaluate(trained, ["micro_law"], pretrained=str(tmp_path))


def test_an_adapter_of_another_sae_is_refused(trained, tmp_path):
    (folder,) = trained.base.path.parent.parent.glob("sae_training/*/sae")
    sae = load_sae(folder)
    with torch.no_grad():
        sae.W_enc.mul_(1.5)
    save_sae(sae, tmp_path, {})
    with pytest.raises(UserError, match="trained on another SAE at site 1"):
        simple_evaluate(trained, ["micro_law"], sae=str(tmp_path))


def test_a_group_average_is_the_mean_of_its_tasks_with_its_error():
    scores = {
        name: Score("m", value, stderr, 4, "1", [])
        for name, value, stderr in (("a", 0.2, 0.3), ("b", 0.6, 0.4))
    }
    found = averages(scores, {"both": ["a", "b"], "absent": ["c"]})
    assert set(found) == {"both"}
    assert found["both"] == Estimate(pytest.approx(0.4), pytest.approx(0.25))
