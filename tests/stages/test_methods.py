"""Every method through both ways of training: what it leaves, what it refuses, how it resumes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerlora.cli import sections
from steerlora.data.orders import sequence_of
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import RunReport, run
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.evaluation.records import Ablation, DomainSequence, Evaluation, read_record
from steerlora.methods.routed_lora.prototypes import PrototypeRouter
from steerlora.stages import (
    adapter_training,
    causal_ablation,
    common,
    evaluate,
    sequential_forgetting,
)
from steerlora.stages.common import load_base
from steerlora.stages.sequence_state import SequenceState

OTHERS = ("base", "stan", "sae_steering", "steering_vector")
"""What they do is tested in tests/methods/test_base_alone.py, tests/stages/test_stan.py and
tests/stages/test_steering.py."""
METHODS = [
    name
    for name in sections.groups()["method"]
    if not name.startswith(OTHERS) and not name.endswith("_narrow")  # the same, and smaller
]


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    """The smoke experiment's artifacts, to add to."""
    root = tmp_path_factory.mktemp("methods") / "artifacts"
    shutil.copytree(smoke.root, root)
    return ArtifactStore(root)


def sequence(smoke, store: ArtifactStore, *changes: str) -> tuple[DomainSequence, RunReport]:
    step = sequential_forgetting.step(smoke.config(*changes))
    report = run([step], store)
    return _record_of(report[step]), report


def _record_of(artifact: Artifact) -> DomainSequence:
    return read_record(artifact / sequential_forgetting.RESULT, DomainSequence)


def trained(smoke, store: ArtifactStore, *changes: str) -> Path:
    step = adapter_training.step(smoke.config(*changes))
    return run([step], store)[step].path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / adapter_training.FOLDER / "adapter_model.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_is_scored_and_goes_through_a_sequence(name, smoke, store):
    step = evaluate.step(smoke.config(f"method={name}"))
    scores = read_record(run([step], store)[step] / evaluate.SCORES, Evaluation)
    assert scores.method == name
    assert len(scores.tasks) == 9
    method = smoke.config(f"method={name}").method
    routed = method.sites if getattr(method, "routed", False) else []
    assert list(scores.routing_by_site) == routed
    record, _ = sequence(smoke, store, f"method={name}")
    assert len(record.matrix) == 6
    assert record.general is not None
    assert len(record.drift) == (5 if name == "sc_lora_reference" else 0)


def test_reference_is_the_published_configuration(smoke):
    config = smoke.config("method=sc_lora_reference")
    method = config.method
    assert (method.sites, method.streams, method.monitor) == ([0, 1], [1, 2], 2)
    assert (method.source, method.reads, method.per_module) == ("base", "output", True)
    assert method.published_losses
    assert method.compares_sites
    assert not method.compares_with_base
    assert vars(config.method.losses) == {
        "task": 1.0,
        "preservation": 1.0,
        "steering": 1.0,
        "gate_sparsity": 0.01,
        "rank_budget": 0.001,
        "load_balance": 0.01,
        "diversity": 0.001,
        "orthogonality": 0.0,
    }


def test_prototypes_come_from_the_domains_so_far_in_the_order_of_arrival(smoke, store, monkeypatch):
    fitted = []
    original = PrototypeRouter.fit

    def fit(self, specialist, signals, *rows):
        original(self, specialist, signals, *rows)
        fitted.append((specialist, self.known.tolist()))

    monkeypatch.setattr(PrototypeRouter, "fit", fit)
    sequence(smoke, store, "method=sc_lora_context", "seed=11")
    general = [False] * 5 + [True]
    assert fitted[0] == (None, general)
    for position, (specialist, known) in enumerate(fitted[1:]):
        assert specialist == position
        assert known == [index <= position for index in range(5)] + [True]


@pytest.mark.parametrize("name", ["sc_lora_context", "o_lora"])
def test_own_specialists_leave_the_earlier_ones_as_they_were(name, smoke, store, monkeypatch):
    seen = []
    original = SequenceState.save

    def save(self, *place):
        original(self, *place)
        layers = {n: w for n, w in self.weights.items() if n.startswith("layers.")}
        seen.append({name: weight.clone() for name, weight in layers.items()})

    monkeypatch.setattr(SequenceState, "save", save)
    sequence(smoke, store, f"method={name}", "seed=12", "order.steps_per_domain=2")
    rank = smoke.config(f"method={name}").method.rank
    for position in range(1, 5):
        for key, now in seen[position].items():
            before = seen[position - 1][key]
            if key.endswith("B"):
                now, before = now.t(), before.t()
            same = (now == before).view(5, rank, -1).flatten(1).all(1).tolist()
            assert [index for index in range(5) if not same[index]] in ([position], [])
    moved = seen[4][next(k for k in seen[4] if k.endswith("B"))] != 0
    assert moved.any()


def test_the_specialist_that_a_domain_used_most_is_frozen(smoke, store, monkeypatch):
    frozen = []
    original = SequenceState.save

    def save(self, *place):
        original(self, *place)
        frozen.append(list(self.learner["frozen"]))

    monkeypatch.setattr(SequenceState, "save", save)
    sequence(smoke, store, "method=sc_lora", "method.isolation=frozen")
    assert [len(found) for found in frozen] == [1, 2, 3, 3, 3]  # one of four stays free
    assert len(set(frozen[-1])) == 3


RESUMED = {
    "prototypes": ("method=sc_lora_context",),
    "memory and replay": (
        "method=sc_lora",
        "method.active=2",
        "method.memory.enabled=true",
        "method.memory.every=1",
        "method.memory.spawn_confidence=1",
        "method.memory.spawn_similarity=1",
        "method.replay.ratio=0.5",
    ),
    "frozen": ("method=sc_lora", "method.isolation=frozen"),
    "monitor": ("method=sc_lora_reference",),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_an_interrupted_sequence_ends_as_an_unbroken_one(kind, smoke, store, monkeypatch):
    changes = (*RESUMED[kind], "order.steps_per_domain=3", "trainer.checkpoint_seconds=1e-9")
    ends = []

    def save(self, *place, original=SequenceState.save):
        original(self, *place)
        ends.append({name: value.clone() for name, value in self.weights.items()})

    monkeypatch.setattr(SequenceState, "save", save)
    step = sequential_forgetting.step(smoke.config(*changes))
    unbroken = run([step], store)[step]
    expected, whole = _record_of(unbroken), ends[-1]
    shutil.rmtree(unbroken.path)

    original, calls = common.fit, []

    def interrupted(module, batch, *args, **kwargs):
        calls.append(None)
        if len(calls) != 3:
            return original(module, batch, *args, **kwargs)

        def until(number):  # a domain's second step never comes
            if number == 1:
                raise KeyboardInterrupt
            return batch(number)

        return original(module, until, *args, **kwargs)

    monkeypatch.setattr(common, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([step], store)
    ends.clear()
    found = _record_of(run([step], store)[step])
    assert found == expected
    assert len(ends) == 3  # the first two domains were not trained again
    for name, value in whole.items():
        assert torch.equal(value, ends[-1][name]), name
    if kind == "memory and replay":
        assert found.events


def test_replay_repeats_earlier_domains(smoke, store, monkeypatch):
    owners = []
    original = common.fit

    def fit(module, batch, steps, **kwargs):
        owners.append([batch(number).domains.unique().tolist() for number in range(steps)])
        return original(module, batch, steps, **kwargs)

    monkeypatch.setattr(common, "fit", fit)
    changes = ("method=lora", "order.steps_per_domain=4", "method.replay.ratio=0.5")
    record, _ = sequence(smoke, store, *changes)
    assert record.replay == 0.5
    assert owners[0] == [[0]] * 4
    for position in range(1, 5):
        assert [found == [position] for found in owners[position]] == [True, False, True, False]
        assert all(found[0] < position for found in owners[position][1::2])


def test_orders_by_index_are_all_there_is(smoke):
    config = smoke.config("order=permutation", "order.index=7")
    orders = [
        sequence_of(replace(config.order, index=index), config.domains) for index in range(120)
    ]
    assert len(set(orders)) == 120
    assert sequence_of(config.order, config.domains) == orders[7]
    with pytest.raises(UserError, match=r"order.index=120: 5 domains have 120 orders, 0 to 119"):
        smoke.config("order=permutation", "order.index=120")


def test_a_retrained_control_is_trained_and_scored_under_it(smoke, store):
    under = ("method=sc_lora", "intervention=shuffle", "intervention.phase=training")
    step = evaluate.step(smoke.config(*under))
    scores = read_record(run([step], store)[step] / evaluate.SCORES, Evaluation)
    assert (scores.intervention, scores.phase) == ("shuffle", "training")
    plain, retrained = (weights(trained(smoke, store, *c)) for c in (under[:1], under))
    assert any(not torch.equal(plain[name], retrained[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ("method=sc_lora", "intervention=permute_latents", "intervention.phase=training"),
            "which is no control",
        ),
        (("method=lora", "intervention=shuffle"), "acts on a control signal"),
        (("method=sc_lora", "intervention.name=shufle"), "did you mean 'shuffle'"),
        (("method=sc_lora", "method.router=liner"), "method.router=liner: did you mean 'linear'"),
    ],
)
def test_controls_that_mean_nothing_are_refused_before_work(changes, says, smoke):
    with pytest.raises(UserError, match=says):
        adapter_training.step(smoke.config(*changes)) and evaluate.step(smoke.config(*changes))


def test_an_ablation_is_of_an_adapter_trained_intact(smoke):
    with pytest.raises(UserError, match=r"leave intervention\.phase at evaluation"):
        causal_ablation.step(smoke.config("method=sc_lora", "intervention.phase=training"))


def test_doses_repeat_the_ablation_at_lesser_strength(smoke, store):
    changes = ("method=sc_lora", "study.interventions=[invert]", "study.doses=[0.001,0.5]")
    step = causal_ablation.step(smoke.config(*changes))
    record = read_record(run([step], store)[step] / causal_ablation.RESULT, Ablation)
    assert list(record.interventions) == ["intact", "invert"]
    assert list(record.doses["invert"]) == [0.001, 0.5]
    assert record.doses["invert"][0.001] == record.interventions["intact"]


def test_what_compares_scores_has_the_domains_own_tasks(smoke, store):
    """A sequence scores every domain; an ablation those whose tasks are asked for, else all."""
    changes = ("method=sc_lora", "evaluation.tasks=[micro_law]", "study.interventions=[invert]")
    record, _ = sequence(smoke, store, *changes)
    assert len(record.matrix[0]) == 5
    step = causal_ablation.step(smoke.config(*changes))
    record = read_record(run([step], store)[step] / causal_ablation.RESULT, Ablation)
    assert {name: list(of) for name, of in record.interventions.items()} == {
        "intact": ["law"],
        "invert": ["law"],
    }
    assert record.domains == ("law",)


def test_the_monitors_own_artifacts_can_be_asked_for(smoke):
    config = smoke.config("stage=features", "method.monitor=2")
    assert [step.config.site for step in STAGES["features"].steps(config, None)] == [1, 2]


def test_hard_rank_is_of_the_evaluation_not_of_the_training(smoke):
    soft, hard = (
        evaluate.step(smoke.config("method=sc_lora", f"method.hard_rank={rank}"))
        for rank in (0, 0.5)
    )
    assert soft.fingerprint != hard.fingerprint
    assert soft.inputs["adapter"].fingerprint == hard.inputs["adapter"].fingerprint


def test_a_collapse_stops_a_training_that_is_told_to_stop(smoke, store):
    changes = (
        "method.health.collapse=stop",
        "method.health.collapse_below=1",
        "method.health.log_every=1",
    )
    step = adapter_training.step(smoke.config("method=sc_lora", "seed=9", *changes))
    with pytest.raises(UserError, match="routing has collapsed"):
        run([step], store)


def test_joint_training_keeps_its_history(smoke, store):
    folder = trained(smoke, store, "method=sc_lora", "method.health.log_every=1")
    history = json.loads((folder / adapter_training.HISTORY).read_text())
    assert [row["step"] for row in history["routing"]] == [1, 2]
    assert history["events"] == []


def test_prototypes_of_the_taxonomy_reweight_a_learnt_gate(smoke, store):
    folder = trained(smoke, store, "method=sc_lora", "method.prototypes=true")
    prototypes = weights(folder)["routers.1.prototypes"]
    assert prototypes.shape[0] == 4
    assert prototypes.abs().sum() > 0


def test_a_bundled_adapter_is_not_trained_again_and_is_as_if_it_had_been(smoke, store, monkeypatch):
    bundled = ("method=sc_lora_context", "seed=21", "method.bundle_sae=true")
    step = adapter_training.step(smoke.config(*bundled))
    at_once = run([step], store)[step].path
    aside = at_once.rename(at_once.with_name("aside"))
    trained(smoke, store, *bundled[:2])
    monkeypatch.setattr(common, "fit", None)
    again = trained(smoke, store, *bundled)
    files = {path.relative_to(aside) for path in aside.rglob("*") if path.is_file()}
    assert Path("adapter/sae_1/sae_weights.safetensors") in files
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    for name in files - {Path("manifest.json")}:
        assert (aside / name).read_bytes() == (again / name).read_bytes(), name


def test_a_saved_context_adapter_routes_as_it_did(smoke, store):
    from steerlora.methods.saving import load_adapter

    step = adapter_training.step(smoke.config("method=sc_lora_context"))
    report = run([step], store)
    base = report[next(s for s in step.upstream if s.stage == "base")]
    model, _ = load_base(base)
    adapter = load_adapter(model, report[step] / adapter_training.FOLDER)
    assert adapter.routers["1"].known.all()
    assert adapter.config.context == "causal_mean"
    assert adapter.config.specialists == 5
