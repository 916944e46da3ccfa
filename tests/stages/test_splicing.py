"""The stage that measures what SAEs in place of streams cost, and what is won back."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.experiments import TINY
from torch.nn.functional import cross_entropy

from steerlora.cli import compose, experiment
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.evaluation.records import read_record
from steerlora.evaluation.splicing import WAYS, Splicing
from steerlora.methods.saving import load_adapter
from steerlora.stages import adapter_training, common, splicing

ASKED = (
    *TINY,
    *("method=spliced_lora", "method.rank=2", "stage=splicing", "stage.settings.rows=40"),
    *("sae.end_to_end.batch_size=8", "trainer.learning_rate=0.01"),
)
CONDITIONS = (
    'stage.settings.saes={saes:[],tuned:["sae.end_to_end.steps=2"]}',
    'stage.settings.adapters={lora:[],noise:["method.dictionary=noise"]}',
    "stage.settings.tasks=[micro_mmlu]",
    "stage.settings.scored=[lora]",
)


def steps_of(*changes: str):
    overrides = [*ASKED, *changes]
    return STAGES["splicing"].steps(
        compose.load(overrides), lambda *more: compose.load([*overrides, *more])
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple]:
    """{condition: (record, artifact, what the step read)}."""
    store = ArtifactStore(tmp_path_factory.mktemp("splicing"))
    steps = steps_of(*CONDITIONS)
    finished = run(steps, store, progress=SilentProgress())
    return {
        step.config.condition: (
            read_record(finished[step] / splicing.RESULT, Splicing),
            finished[step],
            {name: finished.artifacts[one.fingerprint] for name, one in _inputs(step)},
        )
        for step in steps
    }


def _inputs(step):
    for name, value in step.inputs.items():
        yield name, value[0] if isinstance(value, tuple) else value


def test_losses_are_those_of_whole_forwards(found):
    record, _, inputs = found["lora"]
    model, tokenizer = common.load_base(inputs["base"])
    method = load_adapter(model, inputs["adapter"] / adapter_training.FOLDER)
    names = compose.load(ASKED).domains.names
    length = compose.load(ASKED).trainer.max_length
    rows = common.other_general_text(inputs["domains"], names, tokenizer, length, 40)
    assert len(rows) == len(record.tokens) == 40
    for index in (0, 7, 39):
        ids = torch.tensor([rows[index].input_ids])
        assert record.tokens[index] == ids.shape[1] - 1
        with torch.no_grad():
            logits = {}
            for way in WAYS:
                with splicing.running(method, way):
                    logits[way] = model(ids).logits[0, :-1]
        base = logits["base"].log_softmax(-1)
        for way, scores in logits.items():
            nats = float(cross_entropy(scores, ids[0, 1:], reduction="sum"))
            assert record.losses[way].cross_entropy[index] == pytest.approx(nats, rel=1e-4)
            kl = float((base.exp() * (base - scores.log_softmax(-1))).sum())
            assert record.losses[way].kl[index] == pytest.approx(kl, rel=1e-3, abs=1e-4)
    assert record.kl("base") == 0
    assert len({round(record.loss(way), 9) for way in WAYS}) == 4


def test_streams_and_features_are_of_the_adapted_model(found):
    record, _, _ = found["lora"]
    assert list(record.streams["method"]) == [1, 2]
    assert record.streams["method"][1].distance == 0  # the stream that the SAE reads is the base's
    assert record.streams["method"][1].cosine == pytest.approx(1)
    assert record.streams["method"][2].distance > 0
    assert record.latents["method"] == record.latents["saes"]  # nothing below has changed
    assert 0 < record.latents["saes"][1].l0 <= 16
    assert 0 < record.latents["saes"][1].alive <= 1


def test_conditions_share_the_base_and_differ_where_they_should(found):
    records = {name: record for name, (record, *_) in found.items()}
    bases = {tuple(one.losses["base"].cross_entropy) for one in records.values()}
    assert len(bases) == 1
    alone = records["saes"]
    assert alone.losses["method"] == alone.losses["saes"]
    assert alone.losses["adapter"] == alone.losses["base"]
    assert records["tuned"].loss("saes") != alone.loss("saes")
    assert records["noise"].loss("saes") != alone.loss("saes")
    assert (alone.parameters, records["lora"].parameters > 0) == (0, True)
    assert (alone.cost.tokens, records["lora"].cost.tokens > 0) == (0, True)
    assert records["lora"].cost.flops > 0
    assert records["tuned"].cost.flops > 0
    # Two steps of four rows of the same text, and of eight.
    assert 1 < records["tuned"].cost.tokens / records["lora"].cost.tokens < 4


def test_tasks_are_scored_in_every_way_where_asked(found):
    assert set(found["lora"][0].scores) == set(WAYS)
    assert 0 <= found["lora"][0].scores["adapter"]["micro_mmlu"].value <= 1
    assert found["saes"][0].scores == {}


def test_the_adapter_learns_the_text_of_the_saes(found):
    _, _, inputs = found["lora"]
    stored = json.loads((inputs["adapter"] / "manifest.json").read_text())
    assert stored["config"]["method"]["text"] == "saes"
    one, other = (
        adapter_training.step(compose.load([*ASKED, f"method.text={text}"])).fingerprint
        for text in ("saes", "domains")
    )
    assert one != other


def test_replicates_have_seeds_of_their_own():
    found = steps_of(*CONDITIONS, "study.seeds=[3,4]", "study.vary=[sae,adapter]")
    assert len(found) == 8
    assert [step.config.seed for step in found] == 4 * [3] + 4 * [4]
    assert len({step.inputs["base"].fingerprint for step in found}) == 1
    assert len({step.fingerprint for step in found}) == 8


def test_the_experiment_asks_for_every_condition_that_its_claims_name():
    overrides = ["experiment=spliced", "study.seeds=[5]"]
    plan = experiment.plan(compose.load(overrides), lambda *more: compose.load([*overrides, *more]))
    found = {one.step.config.condition: one.step.config for one in plan.staged}
    assert len(found) == len(plan.steps) == 21
    assert {one.seed for one in found.values()} == {5}
    assert found["two_saes"].method.sites == [1, 2]
    assert found["tuned_and_lora"].sae.end_to_end.steps == 200
    assert {name for name, one in found.items() if one.tasks} == {"saes", "lora", "all_layers"}
    settings = compose.load(overrides).study.settings
    assert set(settings["references"]) == {
        name for name, one in found.items() if one.sae.end_to_end.steps
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["method=lora"], "give method=<option> of kind spliced_lora"),
        (["method.rank=0"], "must be a whole number from 1"),
        (["method.rank=64"], "is more than model.width=32"),
        (["method.map_rank=64"], "is more than model.width=32"),
        (["sae=skip_transcoder"], "writes another stream than it reads"),
        (["method.adapted=all", "method.cached_tokens=9"], "nothing of them can be kept"),
        (["method.teacher=shuffled", "trainer.batch_size=1"], "trainer.batch_size to at least 2"),
        (["stage.settings.rows=1"], "a number of rows from 2"),
        (["+stage.settings.row=1"], "stage=splicing has rows"),
        (["stage.settings.scored=[x]"], "there is no x"),
        (["study.seeds=[0,1]", "study.vary=[sae]", CONDITIONS[0]], "adapter's seed: add adapter"),
        (["stage.settings.saes={x:y}"], "a list of overrides"),
    ],
)
def test_bad_input_is_one_line(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        steps_of(*changes)
    assert "\n" not in str(caught.value)


def test_no_general_text_left_is_said(found):
    _, _, inputs = found["lora"]
    many = common.read_rows(inputs["domains"] / "train/law.jsonl")
    assert many
    _, tokenizer = common.load_base(inputs["base"])

    class Small:
        """A domains artifact with as much general text as of one domain."""

        def __truediv__(self, name: str):
            own = "train/law.jsonl" if name == "pretrain.jsonl" else name
            return inputs["domains"] / own

    with pytest.raises(UserError, match=r"domains\.pretrain_items to more than"):
        common.other_general_text(Small(), ["law"], tokenizer, 64, 8)
