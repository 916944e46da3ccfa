"""The whole path, walked once with next to no training: what it leaves, and what it reuses."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.offline import read_runs
from safetensors.torch import load_file

import steerlora
from steerlora.config import Config
from steerlora.engine import steps
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.inventory import listing
from steerlora.engine.run import RunReport, run
from steerlora.engine.steps import Step
from steerlora.evaluation.records import (
    BASE,
    SCHEMA,
    Ablation,
    DomainSequence,
    Evaluation,
    read_record,
)
from steerlora.stages import adapter_training, causal_ablation, evaluate, sequential_forgetting
from steerlora.stages.common import load_base

DOMAINS = ("instruction", "math", "code", "medicine", "law")
AVERAGES = {"instruction_following", "general_knowledge", "mmlu_pro", "gsm8k", "target"}
BUILT = {
    "domains": 1,
    "base": 1,
    "activations": 1,
    "sae_training": 1,
    "adapter_training": 3,
    "evaluate": 4,
    "causal_ablation": 1,
    "sequential_forgetting": 2,
}
"""What the smoke experiment needs: one base and one SAE, whatever the number of adapters."""


def built(report: RunReport) -> Counter:
    return Counter(step.stage for step in report.steps if not step.reused)


def fingerprints(config: Config) -> dict[str, set[str]]:
    """{stage: fingerprints} of all that one configuration's scores need."""
    found: dict[str, set[str]] = {}

    def visit(step: Step) -> None:
        found.setdefault(step.stage, set()).add(step.fingerprint)
        for upstream in step.upstream:
            visit(upstream)

    for step in (causal_ablation.step(config), sequential_forgetting.step(config)):
        visit(step)
    return found


@pytest.fixture(scope="module")
def before(smoke) -> dict[str, set[str]]:
    return fingerprints(smoke.config())


def adapter_of(smoke, name: str):
    """The artifact of one trained adapter."""
    return smoke.report[adapter_training.step(smoke.config(f"method={name}"))]


def weights(artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact / "adapter" / "adapter_model.safetensors")


def test_every_stage_is_built_as_often_as_it_must_be(smoke):
    assert built(smoke.report) == BUILT
    assert not any(step.reused for step in smoke.report.steps)


def test_every_artifact_is_whole_and_named_by_its_fingerprint(smoke):
    listed = listing(smoke.root)
    assert Counter(info.stage for info in listed) == BUILT
    assert {info.state for info in listed} == {"complete"}
    for artifact in smoke.report.artifacts.values():
        assert artifact.path == smoke.root / artifact.stage / artifact.fingerprint
        assert artifact.manifest["config"]
        assert artifact.manifest["summary"]
        assert not (artifact / "checkpoints").exists()


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("domains", ["domains.json", "pretrain.jsonl", "train/law.jsonl", "heldout/math.jsonl"]),
        ("base", ["base.json", "model/config.json", "model/model.safetensors"]),
        ("activations", ["activations"]),
        (
            "sae_training",
            ["sae/cfg.json", "sae/sae_weights.safetensors", "quality.json", "held_out.json"],
        ),
        ("adapter_training", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]),
        ("evaluate", ["scores.json"]),
        ("causal_ablation", ["ablation.json"]),
        ("sequential_forgetting", ["sequential.json", "adapters/4_law/adapter_config.json"]),
    ],
)
def test_every_artifact_holds_its_files(smoke, stage, files):
    artifacts = [a for a in smoke.report.artifacts.values() if a.stage == stage]
    assert artifacts
    for artifact in artifacts:
        assert [name for name in files if not (artifact / name).exists()] == []


def test_an_evaluation_has_every_score_with_error_items_and_version(smoke):
    names = set()
    for step, *_ in smoke.planned.evaluations:
        record = read_record(smoke.report[step] / evaluate.SCORES, Evaluation)
        names.add(record.method)
        assert (record.model, record.seed) == ("micro_xs", 0)
        assert record.domains == DOMAINS
        assert record.fingerprint == step.fingerprint
        assert len(record.tasks) == 9
        for task in record.tasks.values():
            assert task.metric
            assert task.version
            assert task.stderr >= 0
            assert task.items == len(task.per_item) == 3
            assert task.value == pytest.approx(sum(task.per_item) / 3)
        assert set(record.averages) == AVERAGES
    assert names == {"none", "lora", "moe_lora", "sc_lora"}


def test_routing_health_is_recorded_for_what_routes(smoke):
    for step, *_ in smoke.planned.evaluations:
        record = read_record(smoke.report[step] / evaluate.SCORES, Evaluation)
        routing = record.routing
        if record.method in ("none", "lora"):
            assert routing is None
            continue
        assert tuple(routing.gate_by_domain) == tuple(routing.rank_by_domain) == DOMAINS
        for gate in routing.gate_by_domain.values():
            assert sum(gate) == pytest.approx(1, abs=1e-4)
        assert 0 < routing.mean_rank <= 2 + 1e-6
        assert routing.tokens > 0
        assert 0 <= routing.usage_entropy <= 1 + 1e-6


def test_an_ablation_scores_every_control_on_every_domain(smoke):
    ((step, *_),) = smoke.planned.ablations
    record = read_record(smoke.report[step] / causal_ablation.RESULT, Ablation)
    wanted = ["intact", "shuffle", "fixed_rank", "oracle_domain"]
    assert list(record.interventions) == wanted
    for scores in record.interventions.values():
        assert tuple(scores) == DOMAINS
        assert all(len(score.per_item) == score.items == 3 for score in scores.values())
    intact = read_record(smoke.report[step.inputs["intact"]] / evaluate.SCORES, Evaluation)
    assert record.interventions["intact"]["law"] == intact.tasks["micro_law"]


def test_a_sequence_has_a_row_before_and_after_every_domain(smoke):
    names = set()
    for step, *_ in smoke.planned.sequentials:
        record = read_record(smoke.report[step] / sequential_forgetting.RESULT, DomainSequence)
        names.add(record.method)
        assert record.order == "broad_first"
        assert record.sequence == record.domains == DOMAINS
        assert len(record.matrix) == len(record.stderr) == 6
        assert all(len(row) == 5 for row in (*record.matrix, *record.stderr))
        assert record.items == 3
        base = read_record(smoke.report[step.inputs["base_scores"]] / evaluate.SCORES, Evaluation)
        assert record.matrix[0][4] == base.tasks["micro_law"].value
    assert names == {"lora", "sc_lora"}


def test_the_base_is_an_ordinary_hugging_face_directory(smoke):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (base,) = [a for a in smoke.report.artifacts.values() if a.stage == "base"]
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert tokenizer.is_fast
    assert tokenizer.chat_template
    assert model.config.vocab_size == len(tokenizer)


def test_a_trained_adapter_loads_in_python_acts_and_leaves_no_trace(smoke):
    model, tokenizer = load_base(
        next(a for a in smoke.report.artifacts.values() if a.stage == "base")
    )
    ids = torch.tensor([tokenizer("law", add_special_tokens=False)["input_ids"] * 4])
    with torch.no_grad():
        before = model(ids).logits
        adapter = steerlora.load_adapter(model, adapter_of(smoke, "sc_lora") / "adapter")
        assert not torch.equal(model(ids).logits, before)
        assert adapter.routing()[1].gate.shape == (*ids.shape, 4)
        adapter.remove()
        assert torch.equal(model(ids).logits, before)


def test_adapters_of_the_three_methods_have_about_equal_size(smoke):
    counts = {
        name: adapter_of(smoke, name).manifest["summary"]["parameters"]
        for name in ("lora", "moe_lora", "sc_lora")
    }
    assert all(count > 0 for count in counts.values())


def test_plain_lora_is_there_in_pefts_format_too(smoke):
    assert (adapter_of(smoke, "lora") / "peft/adapter_config.json").is_file()
    assert not (adapter_of(smoke, "sc_lora") / "peft").exists()


def test_the_report_is_written_and_says_that_it_means_nothing(smoke):
    claims = (smoke.results / "claims.md").read_text()
    assert "meaningless" in claims
    verdicts = json.loads((smoke.results / "claims.json").read_text())
    assert "meaningless" in json.dumps(verdicts) or verdicts.get("meaningful") is False
    for table in ("scale", "ablation", "forgetting"):
        for suffix in ("md", "csv", "tex"):
            assert (smoke.results / f"{table}.{suffix}").stat().st_size > 0
        assert "meaningless" in (smoke.results / f"{table}.md").read_text()
    assert list(smoke.results.rglob("*.png"))
    page = (smoke.results / "report.html").read_text()
    assert "meaningless" in page
    assert "nothing is missing" in page
    provenance = json.loads((smoke.results / "provenance.json").read_text())
    assert {entry["fingerprint"] for entry in provenance["stages"]} == set(smoke.report.artifacts)
    for entry in provenance["stages"]:
        took = smoke.report.artifacts[entry["fingerprint"]].manifest["wall_seconds"]
        assert took > 0
        assert entry["seconds"] == round(took, 1)
    measured = {step.fingerprint for step in smoke.planned.steps}
    assert set(provenance["artifacts"]) == measured


def test_a_second_run_builds_nothing(smoke):
    again = run(smoke.plan().steps, ArtifactStore(smoke.root))
    assert built(again) == {}
    assert len(again.steps) == sum(BUILT.values())


def test_records_of_another_schema_are_built_again(smoke, tmp_path, monkeypatch):
    """The schema is part of the version of every stage that writes records."""
    shutil.copytree(smoke.root, tmp_path, dirs_exist_ok=True)
    (step,) = [step for step, *_ in smoke.planned.evaluations if step.config.method == BASE]
    assert run([step], ArtifactStore(tmp_path)).steps[-1].reused
    for stage in map(
        steps.STAGES.__getitem__, ("evaluate", "causal_ablation", "sequential_forgetting")
    ):
        version, _, schema = stage.version.partition(".")
        assert schema == str(SCHEMA)
        other = replace(stage, version=f"{version}.{SCHEMA - 1}")
        monkeypatch.setitem(steps.STAGES._found, stage.name, other)
    again = replace(step)  # whose fingerprint is not known yet
    assert again.fingerprint != step.fingerprint
    rebuilt = run([again], ArtifactStore(tmp_path))
    assert [built.stage for built in rebuilt.steps if not built.reused] == ["evaluate"]


def test_a_rank_changes_adapters_and_what_is_below_them(smoke, before):
    after = fingerprints(smoke.config("method.rank=3"))
    for stage in ("domains", "base", "activations", "sae_training"):
        assert after[stage] == before[stage]
    for stage in ("adapter_training", "causal_ablation", "sequential_forgetting"):
        assert not after[stage] & before[stage]
    assert len(after["evaluate"] & before["evaluate"]) == 1  # the base's own


def test_a_seed_retrains_adapters_on_the_same_base_and_sae(smoke, before):
    after = fingerprints(smoke.config("seed=5"))
    for stage in ("domains", "base", "activations", "sae_training"):
        assert after[stage] == before[stage]
    for stage in ("adapter_training", "causal_ablation", "sequential_forgetting"):
        assert not after[stage] & before[stage]


@pytest.mark.parametrize(
    "change",
    [
        "evaluation.batch_size=7",
        "logger=wandb",
        "trainer.checkpoint_seconds=1",
        "study.workers=2",
        "results.dir=elsewhere",
    ],
)
def test_what_changes_no_result_changes_no_fingerprint(smoke, before, change):
    assert fingerprints(smoke.config(change)) == before


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("domains.seed=1", "domains"),
        ("model.seed=1", "base"),
        ("model.steps=4", "base"),
        ("sae.max_tokens=900", "activations"),
        ("sae.k=8", "sae_training"),
        ("trainer.max_steps=3", "adapter_training"),
        ("evaluation.limit=2", "evaluate"),
    ],
)
def test_a_change_rebuilds_its_stage_and_nothing_above(smoke, before, change, first):
    after = fingerprints(smoke.config(change))
    above = list(BUILT)[: list(BUILT).index(first)]
    assert [stage for stage in above if after[stage] != before[stage]] == []
    assert not after[first] & before[first]


def test_only_what_changed_is_built(smoke, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(smoke.root, root)
    step = adapter_training.step(smoke.config("method.rank=3"))
    assert built(run([step], ArtifactStore(root))) == {"adapter_training": 1}
    seeded = adapter_training.step(smoke.config("seed=9"))
    report = run([seeded], ArtifactStore(root))
    assert built(report) == {"adapter_training": 1}
    ours, theirs = weights(report[seeded]), weights(adapter_of(smoke, "sc_lora"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_adapter_trained_twice_in_two_places_is_one_adapter(smoke, tmp_path):
    step = adapter_training.step(smoke.config("method=sc_lora"))
    twin = run([step], ArtifactStore(tmp_path))[step]
    first = adapter_of(smoke, "sc_lora")
    assert twin.fingerprint == first.fingerprint
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (twin / "adapter" / name).read_bytes() == (first / "adapter" / name).read_bytes()


def test_a_truncated_file_is_found_named_and_built_again(smoke, tmp_path, caplog):
    root = tmp_path / "copy"
    shutil.copytree(smoke.root, root)
    step = adapter_training.step(smoke.config("method=sc_lora"))
    damaged = root / step.stage / step.fingerprint / "adapter/adapter_model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    report = run([step], ArtifactStore(root))
    assert built(report) == {"adapter_training": 1}
    assert damaged.read_bytes() == whole
    assert "adapter_model.safetensors" in caplog.text
    assert "damaged" in caplog.text


def test_wandb_changes_nothing(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    root = tmp_path / "copy"
    shutil.copytree(smoke.root, root)
    training = adapter_training.step(smoke.config("logger=wandb", f"logger.dir={tmp_path}"))
    shutil.rmtree(root / training.stage / training.fingerprint)
    report = run([training], ArtifactStore(root), asked_for=training)
    assert built(report) == {"adapter_training": 1}
    assert [one.id for one in read_runs(tmp_path)] == ["mine"]
    logged, plain = weights(report[training]), weights(adapter_of(smoke, "sc_lora"))
    assert all(torch.equal(logged[name], plain[name]) for name in plain)


def test_no_logger_writes_nothing(smoke):
    assert not list(smoke.root.rglob("*.wandb"))
    assert not list(Path.cwd().glob("wandb"))


def test_every_number_stored_is_finite(smoke):
    def numbers(value):
        if isinstance(value, dict):
            for inner in value.values():
                yield from numbers(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from numbers(inner)
        elif isinstance(value, float):
            yield value

    for artifact in smoke.report.artifacts.values():
        assert all(map(math.isfinite, numbers(artifact.manifest["summary"])))
