"""Steering through the stages by configuration alone: methods, the stage, the experiment."""

from __future__ import annotations

import json

import pytest
from helpers.experiments import TINY

from steerlora.cli import compose, experiment
from steerlora.data.domains.micro.concepts import CONCEPTS, prompts, world_of
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.evaluation.records import read_record
from steerlora.evaluation.steering import SteeringRecord
from steerlora.methods.saving import load_adapter
from steerlora.stages import common, evaluate, sequential_forgetting, steering, steering_ways
from steerlora.stages.steered_answers import Judge

ASKED = (*TINY, "method=sae_steering", "study.interventions=[]")
SMALL = (
    "stage=steering",
    "stage.settings.texts=12",
    "stage.settings.support=12",
    "stage.settings.prompts=4",
    "stage.settings.factors=[0.5,2]",
    "stage.settings.least_output_score=0",
    "+stage.settings.concepts=[colour,law,towns]",
    'stage.settings.trained=["method=lora","method.rank=2","trainer.max_steps=2"]',
)
STEERING = (*ASKED, *SMALL)


def steps_of(*changes: str, given: tuple[str, ...] = STEERING):
    overrides = [*given, *changes]
    return STAGES["steering"].steps(
        compose.load(overrides), lambda *more: compose.load([*overrides, *more])
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("steering"))


@pytest.fixture(scope="module")
def found(store):
    """{condition: (record, artifact, step)} of every way."""
    steps = steps_of('stage.settings.saes={l0_2:["sae.k=2"]}')
    finished = run(steps, store, progress=SilentProgress())
    return {
        step.config.condition: (
            read_record(finished[step] / steering.RESULT, SteeringRecord),
            finished[step],
            step,
        )
        for step in steps
    }, finished


def test_every_way_gives_a_record(found):
    records = {name: record for name, (record, *_) in found[0].items()}
    assert set(records) == {*steering_ways.WAYS, "l0_2"}
    for record in records.values():
        assert [one.concept for one in record.concepts] == ["colour", "law", "towns"]
        for one in record.concepts:
            assert one.factor in (0.5, 2)
            assert len(one.searched) == 2
            assert {len(own) for own in one.grades.values()} == {2}
            assert 0 <= record.score <= 2
    assert records["lora"].concepts[0].auroc is None
    assert {one.factor for one in records["unsteered"].concepts} <= {0.5, 2}
    assert records["unsteered"].concepts[0].f1 is None
    assert records["interpretable"].l0 > records["l0_2"].l0
    assert records["probe"].l0 is None
    latents = [
        [one.candidate for one in records[way].concepts] for way in ("latents", "interpretable")
    ]
    assert latents[0] == latents[1]  # nothing is filtered
    other = [one.candidate for one in records["random_latent"].concepts]
    assert all(a != b for a, b in zip(latents[0], other, strict=True))


@pytest.mark.parametrize("way", ["latents", "difference_of_means"])
def test_a_saved_adapter_gives_the_answers_that_were_graded(way, found):
    record, artifact, step = found[0][way]
    inputs = {name: found[1].artifacts[one.fingerprint] for name, one in step.inputs.items()}
    model, tokenizer = common.load_base(inputs["base"])
    world = world_of(inputs["domains"].json("world.json"))
    settings = step.config
    own = [p for c in settings.concepts for p in prompts(world, c, steering_ways.UNSTEERED, 1)]
    judge = Judge(model, tokenizer, world, own, settings.seed)
    for number, one in enumerate(record.concepts):
        asked = prompts(world, one.concept, 4, settings.seed)[1::2]
        method = load_adapter(model, artifact / steering_ways.ADAPTERS / one.concept)
        said = judge.answer(asked, settings.seed + 1000 * number + 1)
        assert judge.grades(asked, said, method) == one.grades
        method.remove()


def test_the_methods_train_are_scored_and_go_through_a_sequence(store):
    for method in ("sae_steering", "steering_vector"):
        config = compose.load([*ASKED, f"method={method}"])
        asked = evaluate.step(config), sequential_forgetting.step(config)
        done = run(asked, store, progress=SilentProgress())
        scores = json.loads((done[asked[0]] / evaluate.SCORES).read_text())
        assert scores["method"] == method


def test_the_experiment_asks_for_every_way_and_a_reduced_one_ends_with_a_report(store, tmp_path):
    overrides = ["experiment=steering", "study.seeds=[5]"]
    plan = experiment.plan(compose.load(overrides), lambda *more: compose.load([*overrides, *more]))
    found = {one.step.config.condition: one.step.config for one in plan.staged}
    assert set(found) == {*steering_ways.WAYS, "l0_4", "l0_64"}
    assert {one.seed for one in found.values()} == {5}
    assert {one.concepts for one in found.values()} == {CONCEPTS}
    assert {len(one.factors) for one in found.values()} == {8}
    assert found["l0_4"].way == found["interpretable"].way

    small = [
        *ASKED,
        f"results.dir={tmp_path}",
        "study.stage=steering",
        "+study.settings={ways:[latents,probe],texts:12,support:12,prompts:4,factors:[0.5,2],"
        "concepts:[colour,law,towns],least_output_score:0}",
    ]
    config = compose.load(small)
    planned = experiment.plan(config, lambda *more: compose.load([*small, *more]))
    finished = run(planned.steps, store, progress=SilentProgress())
    written = experiment.report(config, planned, finished.artifacts)
    assert {file.name for file in written.files} >= {"report.html", "steered.png"}
    assert [claim.id for claim in written.claims] == ["V1", "V2", "V3", "V4", "V5"]
    assert set(dict(written.tables)) == {"ways", "concepts"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["method=lora"], "give method=<option> of kind sae_steering"),
        (["method=steering_vector"], "steers along latents, which method=steering_vector does not"),
        (["stage.settings.vector=lora"], "stage.settings.vector=lora: this method steers along no"),
        (["stage.settings.trained=[]"], "of low rank, as in"),
        (["method.latents=[99999]"], "the SAE has latents 0 to"),
        (["sae=skip_transcoder"], "writes another stream than it reads"),
        (["stage.settings.texts=11"], "has less than the support of 12"),
        (["stage.settings.concepts=[colour,lore]"], "stage.settings.concepts=lore: did you mean"),
        (["+stage.settings.ways=[latent]"], "stage.settings.ways=latent: did you mean 'latents'"),
        (["stage.settings.factors=[1,0]"], "numbers above 0"),
        (["stage.settings.factors=[1]"], "give two or more"),
        (["stage.settings.prompts=1"], "a whole number from 2"),
        (["+stage.settings.way=1"], "stage=steering has ways"),
    ],
)
def test_bad_input_is_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        steps_of(*changes)
    assert "\n" not in str(caught.value)


def test_a_base_whose_latents_say_nothing_is_said(store):
    (step,) = steps_of("+stage.settings.ways=[latents]", "stage.settings.least_output_score=0.9")
    with pytest.raises(UserError, match=r"no latent that fires has an output score of 0.9, the"):
        run([step], store, progress=SilentProgress())


def test_how_a_rival_is_trained_counts_for_it_alone():
    one, other = (
        {step.config.way: step.fingerprint for step in steps_of(f"trainer.learning_rate={rate}")}
        for rate in (0.1, 0.2)
    )
    assert {way for way in one if one[way] != other[way]} == {"lora"}


def test_text_that_has_no_rules_is_refused(tmp_path):
    with pytest.raises(UserError, match="by the rules of the micro world"):
        steps_of("domains=text", f"domains.dir={tmp_path}")
