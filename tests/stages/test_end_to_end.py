"""End-to-end training as stage ``sae_training`` runs it: of which SAE, on what, to what end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.experiments import TINY

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.data.chat import EncodedChat
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.saes.relu import ReLU
from steerlora.saes.saelens import load_sae, save_sae
from steerlora.stages import features, sae_training
from steerlora.stages.sae_text import SAEText

FINE_TUNED = "sae.end_to_end.steps=30"
LEARNT = ("model.steps=30", "domains.pretrain_items=400", "sae.steps=60", "sae.max_tokens=3000")


def config_of(*changes: str) -> Config:
    return compose.load([*TINY, *LEARNT, "sae.learning_rate=3e-3", *changes])


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Callable[..., Artifact]:
    """``build(*options)``: the SAE of the control site; what is upstream is built once."""
    store = ArtifactStore(tmp_path_factory.mktemp("end_to_end") / "artifacts")

    def build(*changes: str) -> Artifact:
        (step,) = sae_training.steps(config_of(*changes))
        return run([step], store)[step]

    return build


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "skip_transcoder"])
def test_fine_tuning_lowers_the_divergence_on_held_out_rows(architecture, build):
    before, after = (build(f"sae={architecture}", *more) for more in ([], [FINE_TUNED]))
    was, now = before.json("quality.json"), after.json("quality.json")
    assert now["kl_div_with_sae"] < was["kl_div_with_sae"]
    assert now["ce_loss_without_sae"] == was["ce_loss_without_sae"]
    summary = after.manifest["summary"]
    for name in sae_training.COMPARED:
        assert summary[f"{name}_before"] == was[name]
        assert summary[name] == now[name]
    assert summary["tokens_per_second"] > 0


def test_a_new_sae_is_trained_without_activations(build):
    options = ("sae.end_to_end.start=new", "sae.end_to_end.mse_weight=0")
    (step,) = sae_training.steps(config_of(FINE_TUNED, *options))
    assert set(step.inputs) == {"domains", "base"}
    few, many = (
        build(f"sae.end_to_end.steps={steps}", *options).json("quality.json") for steps in (1, 60)
    )
    assert many["kl_div_with_sae"] < few["kl_div_with_sae"]


def test_a_given_sae_is_fine_tuned_as_what_it_is(build, tmp_path):
    """Its architecture is not the configuration's, and its rows have lengths of their own."""
    sae = ReLU(32, 64)
    with torch.no_grad():
        sae.W_dec.mul_(0.5)
    save_sae(sae, tmp_path / "sae", {"hook_name": "blocks.1.hook_resid_pre"})
    given = build(f"sae.path={tmp_path / 'sae'}")
    tuned = build(f"sae.path={tmp_path / 'sae'}", FINE_TUNED)
    found = load_sae(tuned / "sae")
    assert found.architecture == "relu"
    assert (found.W_dec.norm(dim=1) < 0.9).all()
    names = [artifact.json("quality.json")["kl_div_with_sae"] for artifact in (tuned, given)]
    assert names[0] < names[1]


def test_options_of_the_fine_tuning_leave_what_is_fine_tuned_alone():
    """Neither it nor the activations are made again; every option makes another fine-tuned SAE."""
    options = ("start=new", "batch_size=3", "mse_weight=0", "learning_rate=0.1")
    (plain,), (tuned,) = (sae_training.steps(config_of(*more)) for more in ([], [FINE_TUNED]))
    assert tuned.inputs["sae"].fingerprint == plain.fingerprint
    found = {plain.fingerprint, tuned.fingerprint}
    for option in options:
        (step,) = sae_training.steps(config_of(FINE_TUNED, f"sae.end_to_end.{option}"))
        if option != "start=new":
            assert step.inputs["sae"].fingerprint == plain.fingerprint
        found.add(step.fingerprint)
    assert len(found) == 2 + len(options)


@pytest.mark.parametrize(
    "option", ["adam_beta2=0.5", "warmup_fraction=0.9", "decay_fraction=0", "median_start=false"]
)
def test_what_every_training_of_an_sae_follows_counts_end_to_end(option, build):
    new = (FINE_TUNED, "sae.end_to_end.start=new")
    plain, other = (build(*new, *more) for more in ([], [f"sae.{option}"]))
    assert plain.manifest["summary"]["fingerprint"] != other.manifest["summary"]["fingerprint"]


def test_a_corpus_is_learnt_from_beside_the_rows(build, tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("jonas signs the contract about copper in arvik .\n" * 300)
    options = ("sae.end_to_end.steps=4", "sae.end_to_end.start=new")
    plain, mixed = (build(*options, *more) for more in ((), (f"sae.corpus={text}",)))
    assert plain.fingerprint != mixed.fingerprint
    names = [one.manifest["summary"]["fingerprint"] for one in (plain, mixed)]
    assert names[0] != names[1]
    text.write_text("jonas signs the contract about tin in arvik .\n" * 300)
    (step,) = sae_training.steps(config_of(*options, f"sae.corpus={text}"))
    assert step.fingerprint != mixed.fingerprint


@pytest.mark.parametrize("sentences", [3, 300])
def test_windows_of_a_corpus_have_half_of_the_tokens(sentences, make_tokenizer, tmp_path):
    """However short it is: then it is read again."""
    text = tmp_path / "corpus.txt"
    text.write_text("jonas signs the contract about copper in arvik .\n" * sentences)
    tokenizer, length = make_tokenizer(), 12
    rows = [EncodedChat([number] * (3 + number % 5), 1) for number in range(1, 11)]
    found = SAEText(rows, str(text), tokenizer, length, 0).drawn(200)
    assert len(found) == 200
    own = [row for row in found if row in rows]
    assert all(own.count(row) - len(own) // len(rows) in (0, 1) for row in rows)
    windows = [row for row in found if row not in rows]
    half = sum(len(row.input_ids) for row in windows) / sum(len(row.input_ids) for row in found)
    assert abs(half - 0.5) < 0.05


def test_features_are_those_of_the_fine_tuned_sae():
    config = config_of(FINE_TUNED)
    (wanted,) = sae_training.steps(config)
    assert wanted.fingerprint in {step.inputs["sae"].fingerprint for step in features.steps(config)}


def test_a_new_sae_and_a_given_one_exclude_each_other():
    with pytest.raises(UserError, match=r"start=new trains an SAE from nothing, and sae.path"):
        config_of(FINE_TUNED, "sae.end_to_end.start=new", "sae.path=mine")


def test_a_base_that_is_spread_over_devices_trains_no_sae():
    (step,) = sae_training.steps(config_of(FINE_TUNED, "evaluation.spread=true"))
    with pytest.raises(UserError, match=r"set evaluation\.spread=false"):
        STAGES["sae_training"].check(step.config)
