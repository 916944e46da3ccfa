"""The geometry of deltas: streams and matrices against slow references; mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.experiments import TINY

from steerlora.cli import compose, experiment
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.evaluation.records import read_record
from steerlora.lm.signal_tokens import ALL_TOKENS
from steerlora.methods.saving import load_adapter
from steerlora.reporting.report import Report
from steerlora.saes.geometry.directions import effective_rank
from steerlora.saes.geometry.records import KINDS, Geometry
from steerlora.stages import adapter_training, geometry
from steerlora.stages.common import load_base
from steerlora.stages.geometry_streams import (
    module_grams,
    scaled,
    specialist_alone,
    token_streams,
    untrained,
    update_norm,
    with_updates,
)
from steerlora.stages.sae_quality import TextBatch

OVERRIDES = (
    "experiment=geometry",
    "model=micro_xs",
    *TINY[1:],
    "sae.latents=48",
    "sae.k=4",
    "study.seeds=[0,1]",
    "study.meaningful=false",
    "study.settings.layers=[2]",
    "study.settings.ranks=[2,4]",
    "study.settings.controls=[4]",
    "study.settings.tokens=200",
    "study.settings.held_out=100",
    "study.settings.steps=3",
    "study.settings.batch_size=32",
)


class Finished(NamedTuple):
    written: Report
    record: Geometry
    inputs: dict[str, Artifact | tuple[Artifact, ...]]


def planned(*changes: str) -> experiment.Plan:
    overrides = [*OVERRIDES, *changes]
    return experiment.plan(compose.load(overrides), lambda *more: compose.load([*overrides, *more]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    root, results = (tmp_path_factory.mktemp(name) for name in ("artifacts", "results"))
    places = (f"artifacts.root={root}", f"results.dir={results}")
    plan = planned(*places)
    found = run(plan.steps, ArtifactStore(root))
    written = experiment.report(compose.load([*OVERRIDES, *places]), plan, found.artifacts)
    (step,) = plan.steps
    inputs = {name: found.artifacts[step.inputs[name].fingerprint] for name in ("base", "domains")}
    inputs["adapters"] = tuple(found.artifacts[s.fingerprint] for s in step.inputs["adapters"])
    record = read_record(found[step] / geometry.RESULT, Geometry)
    return Finished(written, record, inputs)


class Adapted(NamedTuple):
    model: torch.nn.Module
    method: object
    batch: TextBatch


@pytest.fixture
def routed(finished) -> Adapted:
    """The base with the routed adapter, and two rows of text."""
    model, _ = load_base(finished.inputs["base"])
    artifact: Path = finished.inputs["adapters"][2].path
    method = load_adapter(model, artifact / adapter_training.FOLDER)
    assert method.config.routed
    with torch.no_grad():  # a few steps leave B close to zero
        for update in method.low_rank().values():
            update.B.normal_(std=0.1)
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    return Adapted(model, method, TextBatch(ids, torch.ones_like(ids)))


@pytest.mark.slow
def test_the_experiment_has_every_kind_of_deltas(finished):
    record = finished.record
    swept = [(d.rank, d.seed, d.kind) for d in record.deltas if d.method == "lora"]
    assert sorted(swept) == sorted(
        (rank, seed, kind)
        for rank in (2, 4)
        for seed in (0, 1)
        for kind in KINDS
        if rank == 4 or kind in ("trained", "equal_norm")
    )
    by_kind = {k: [d for d in record.deltas if d.kind == k and d.seed == 0] for k in KINDS}
    norms = {d.update_norm for d in by_kind["equal_norm"]}
    assert len(norms) == 1
    trained = [d.update_norm for d in by_kind["trained"] if d.method == "lora"]
    assert min(trained) < norms.pop() < max(trained)
    assert by_kind["untrained"][0].update_norm == by_kind["permuted"][0].update_norm
    assert {s.seed for s in record.references} == {0, 1}
    for one in record.specialists:
        assert len(one.shared) == len(one.routed) == len(one.crossed) == 4
    assert len(record.specialists) == 2
    assert record.tokens >= 200


@pytest.mark.slow
def test_its_report_says_what_is_beside_chance(finished):
    directory = finished.written.directory
    assert [claim.id for claim in finished.written.claims] == [f"G{n}" for n in range(1, 9)]
    assert {claim.verdict for claim in finished.written.claims} == {"no verdict"}
    assert "chance" in (directory / "claims.md").read_text()
    for name in ("likeness.png", "reconstruction.csv", "controls.tex", "specialists.md"):
        assert (directory / name).is_file()
    assert "G8" in (directory / "report.html").read_text()


@pytest.mark.slow
def test_streams_and_gates_are_those_of_a_plain_forward(routed):
    model, method, batch = routed
    found = token_streams(model, [batch], [1, 2], ALL_TOKENS, method)
    slow = model.model(input_ids=batch.input_ids, output_hidden_states=True)
    assert torch.equal(found.streams[1], slow.hidden_states[1].flatten(0, 1))
    with method.disabled():
        base = token_streams(model, [batch], [1, 2], ALL_TOKENS)
    assert torch.equal(found.streams[1], base.streams[1])  # nothing below the site is adapted
    assert not torch.allclose(found.streams[2], base.streams[2], atol=1e-3)
    assert found.gates[1].shape == (18, 4)
    assert base.gates == {}


@pytest.mark.slow
def test_a_modules_own_delta_is_its_low_rank_product(routed):
    model, method, batch = routed
    grams = module_grams(method, [batch], ALL_TOKENS)
    updates = method.low_rank()
    assert grams.keys() == updates.keys()
    name = next(name for name in grams if name.endswith("q_proj"))
    seen = []
    layer = method.targets(model)[name].linear
    hook = layer.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    with torch.no_grad():
        model(input_ids=batch.input_ids)
    hook.remove()
    A, B, scale, specialists = updates[name]
    rank = len(A) // specialists
    routing = method.routing()[1]
    slow = torch.zeros(18, len(B))
    for token, x in enumerate(seen[0].flatten(0, 1)):
        gate, mask = (part.flatten(0, 1)[token] for part in routing)
        for e in range(specialists):
            rows = slice(e * rank, (e + 1) * rank)
            slow[token] += scale * gate[e] * (B[:, rows] @ (mask * (A[rows] @ x)))
    assert torch.allclose(grams[name].float(), slow.t() @ slow, atol=1e-5)
    assert effective_rank(grams[name]) > 1


@pytest.mark.slow
def test_updates_are_replaced_and_come_back(routed):
    model, method, batch = routed
    updates, norm = method.low_rank(), update_norm(method.low_rank())
    with torch.no_grad():
        slow = sum(float((u.scale * u.B @ u.A).square().sum()) for u in updates.values()) ** 0.5
    assert norm == pytest.approx(slow, rel=1e-5)
    before = token_streams(model, [batch], [2], ALL_TOKENS).streams[2]
    with with_updates(method, scaled(updates, 2.5)):
        assert update_norm(method.low_rank()) == pytest.approx(2.5 * norm, rel=1e-5)
    drawn = untrained(updates, torch.Generator().manual_seed(0))
    with with_updates(method, drawn):
        assert update_norm(method.low_rank()) == pytest.approx(norm, rel=1e-4)
        assert not torch.equal(token_streams(model, [batch], [2], ALL_TOKENS).streams[2], before)
    alone = [specialist_alone(updates, e) for e in range(4)]
    for name, update in updates.items():
        assert torch.equal(sum(one[name].B for one in alone), update.B)
    with pytest.raises(RuntimeError), with_updates(method, alone[0]):
        raise RuntimeError
    assert torch.equal(token_streams(model, [batch], [2], ALL_TOKENS).streams[2], before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["study.settings.ranks=[0,2]"], r"ranks=\[0, 2\]: whole numbers from 1"),
        (["study.settings.ranks=[2,2]"], "each once"),
        (
            ["study.settings.ranks=[64]", "study.settings.controls=null"],
            "method.rank=64 is more than model.width=32",
        ),
        (["study.settings.layers=[1]"], "the stream entering layer 1 is the base's own"),
        (["study.settings.layers=[3]"], "micro_xs has 2 layers; 2 is the stream that leaves them"),
        (["study.settings.controls=[3]"], "some of stage.settings.ranks"),
        (["study.settings.tokens=0"], "tokens=0: a number from 1"),
        (["study.settings.options=rank"], "a list of texts"),
        (["+study.settings.layer=2"], "stage=geometry has layers, ranks"),
        (["study.settings.routed=[sc_lora_]"], "sc_lora"),
        (["sae=relu", "sae.epochs=null"], "set sae=topk"),
        (
            [
                "method=base",
                *(f"study.settings.{key}=null" for key in ("ranks", "controls")),
                "study.settings.options=[]",
            ],
            "method=base has nothing to train",
        ),
    ],
)
def test_mistakes_are_named(changes, says):
    kept = [one for one in OVERRIDES if changes[0] != "sae=relu" or one != "sae.k=4"]
    overrides = [*kept, *changes]
    with pytest.raises(UserError, match=says):
        experiment.plan(compose.load(overrides), lambda *more: compose.load([*overrides, *more]))
