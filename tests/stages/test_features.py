"""The features stage against counting token by token, its table, its sites, its instruct model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from steerlora.data.chat import encode_chats
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.lm.decoder import residual_streams
from steerlora.lm.pretrained import open_model, open_tokenizer
from steerlora.saes.saelens import load_sae, sae_metadata
from steerlora.stages import activations, base, features, sae_training
from steerlora.stages.common import general_text, load_base, read_rows

MONITORED = "method.monitor=2"  # the stream that leaves the last of the smoke model's two layers


@pytest.fixture(scope="module")
def store(smoke, tmp_path_factory) -> ArtifactStore:
    """Beside the experiment's own artifacts, which other tests count."""
    root = tmp_path_factory.mktemp("features") / "artifacts"
    return ArtifactStore(shutil.copytree(smoke.root, root))


def build(step, store) -> tuple[Path, dict]:
    """A step's artifact, and the upstream artifacts it read."""
    report = run([step, *step.upstream], store)
    return report[step].path, {name: report[value] for name, value in step.inputs.items()}


@pytest.fixture(scope="module")
def built(smoke, store):
    (step,) = features.steps(smoke.config("features.shown=3", "features.examples=2"))
    return build(step, store)


@pytest.fixture(scope="module")
def monitored(smoke, store):
    return build(features.monitor_step(smoke.config(MONITORED)), store)


def text_of(model, tokenizer, ids: list[int], site: int) -> torch.Tensor:
    """The stream [T, D] of a row's tokens but the first and the marks of turns, of which the one
    that an answer follows is read."""
    row = torch.tensor([ids])
    stream = residual_streams(model, row, torch.ones_like(row), [site])[site][0]
    marks = {*tokenizer.all_special_ids} - {tokenizer.convert_tokens_to_ids("<|assistant|>")}
    kept = [i for i, token in enumerate(ids) if i and token not in marks]
    return stream[kept]


@torch.no_grad()
def counted_by_hand(model, tokenizer, sae, path: Path, site: int) -> tuple:
    """Mean and frequency [N] over the tokens of a jsonl file."""
    total, active, tokens = torch.zeros(sae.latents), torch.zeros(sae.latents), 0
    for row in encode_chats(tokenizer, read_rows(path), 128):
        for x in text_of(model, tokenizer, row.input_ids, site):
            values, indices = sae.encode(x)
            total[indices] += values
            active[indices] += (values > 0).float()
            tokens += 1
    return (total / tokens).double(), (active / tokens).double()


@pytest.mark.parametrize(("which", "site"), [("built", 1), ("monitored", 2)])
def test_mean_and_frequency_equal_a_loop_over_tokens(which, site, request):
    artifact, upstream = request.getfixturevalue(which)
    model, tokenizer = load_base(upstream["base"])
    sae = load_sae(upstream["sae"] / "sae")
    stored = load_file(artifact / features.WEIGHTS)
    assert "drift" not in stored
    for number, name in enumerate(upstream["domains"].json("domains.json")["names"]):
        path = upstream["domains"] / f"train/{name}.jsonl"
        mean, frequency = counted_by_hand(model, tokenizer, sae, path, site)
        torch.testing.assert_close(stored["mean"][number], mean, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(stored["frequency"][number], frequency, atol=2e-3, rtol=0)


def test_masks_exclude_each_other_and_prototypes_follow_them(built):
    stored = load_file(built[0] / features.WEIGHTS)
    assert not (stored["domain"] & stored["general"]).any()
    assert torch.equal(stored["prototypes"] != 0, stored["domain"] & (stored["mean"] != 0))
    assert stored["general"].any()
    assert stored["domain"].any(1).all()


def test_a_taxonomy_is_read_back_as_it_was_stored(built):
    stored, taxonomy = load_file(built[0] / features.WEIGHTS), features.load_taxonomy(built[0])
    for name, value in taxonomy._asdict().items():
        assert torch.equal(value, stored[name]), name
    assert taxonomy.general.dtype == taxonomy.domain.dtype == torch.bool


def test_the_table_names_every_domain_and_shows_words(built):
    artifact, upstream = built
    lines = (artifact / features.TABLE).read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    assert {row[0].strip() for row in rows} == set(
        upstream["domains"].json("domains.json")["names"]
    )
    assert all(len(row) == 6 for row in rows)
    assert all(row[4].strip() for row in rows), "a feature without a token"


def test_examples_are_the_strongest_and_in_order(built):
    listing = json.loads((built[0] / features.LISTING).read_text())
    for entries in listing.values():
        assert len(entries) <= 3
        selectivity = [entry["selectivity"] for entry in entries]
        assert selectivity == sorted(selectivity, reverse=True)
        for entry in entries:
            values = [example["value"] for example in entry["examples"]]
            assert 1 <= len(values) <= 2
            assert values == sorted(values, reverse=True)


# Sites


def test_the_monitor_site_shares_the_harvest_of_the_control_sites(smoke):
    config = smoke.config(MONITORED)
    (control,) = sae_training.steps(config)
    monitor = sae_training.monitor_step(config)
    (own,), (other,) = (step.inputs["activations"] for step in (control, monitor))
    assert own.group == other.group
    assert control.fingerprint != monitor.fingerprint
    assert features.monitor_step(config).inputs["sae"].fingerprint == monitor.fingerprint
    given = sae_training.monitor_step(smoke.config(MONITORED, "sae.path=/control/site/s"))
    assert given.fingerprint == monitor.fingerprint


def test_without_a_monitor_there_is_no_step_of_it_and_one_harvest_for_all_sites(smoke):
    config = smoke.config("method.sites=[0,1]")
    assert sae_training.monitor_step(config) is features.monitor_step(config) is None
    steps = sae_training.steps(config)
    assert len({step.inputs["activations"][0].group for step in steps}) == 1
    # A control site that is monitored besides is harvested, and its SAE trained, once.
    both = smoke.config("method.sites=[0,1]", "method.monitor=1")
    harvests = ([step.fingerprint for step in activations.requested(one)] for one in (config, both))
    assert next(harvests) == next(harvests)
    assert sae_training.monitor_step(both).fingerprint == steps[1].fingerprint


def test_the_last_stream_has_its_name_and_every_figure(monitored, built):
    _, upstream = monitored
    said = sae_metadata(upstream["sae"] / "sae")
    assert (said["hook_name"], said["site"]) == ("blocks.1.hook_resid_post", 2)
    assert sae_metadata(built[1]["sae"] / "sae")["hook_name"] == "blocks.1.hook_resid_pre"
    quality = upstream["sae"].json("quality.json")
    assert quality["explained_variance"] < 1
    assert "ce_loss_score" in quality
    assert "ce_loss_score" in built[1]["sae"].json("quality.json")


def test_a_monitor_beyond_the_last_stream_of_a_given_model_is_refused(smoke, tmp_path):
    with pytest.raises(UserError, match=r"method.monitor=3: micro_xs has 2 layers; 2 is the"):
        smoke.config("model=micro_xs", f"model.path={tmp_path}", "method.monitor=3")


# The instruction-tuned version of the base


@pytest.fixture
def instruct(smoke, store, tmp_path) -> Path:
    """The base with its embeddings moved, as a folder of its own."""
    found = run([base.step(smoke.config())], store)[base.step(smoke.config())]
    model, tokenizer = load_base(found)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
        table += table.std() * noise
    model.save_pretrained(tmp_path / "instruct")
    tokenizer.save_pretrained(tmp_path / "instruct")
    return tmp_path / "instruct"


def test_drift_is_the_change_of_the_mean_activation(smoke, store, built, instruct):
    options = (f"features.instruct_model={instruct}", "features.drift_quantile=0.2")
    (step,) = features.steps(smoke.config(*options))
    artifact, upstream = build(step, store)
    stored = load_file(artifact / features.WEIGHTS)
    model, tokenizer = open_model(str(instruct)), open_tokenizer(str(instruct))
    sae = load_sae(upstream["sae"] / "sae")
    names = upstream["domains"].json("domains.json")["names"]
    moved = [
        counted_by_hand(model, tokenizer, sae, upstream["domains"] / f"train/{n}.jsonl", 1)[0]
        for n in names
    ]
    expected = (torch.stack(moved) - stored["mean"]).mean(0).abs()
    assert expected.max() > 1e-3
    torch.testing.assert_close(stored["drift"], expected, atol=1e-6, rtol=1e-3)
    # Of the base as before; what is general now drifts less than what is not.
    plain = load_file(built[0] / features.WEIGHTS)
    assert torch.equal(stored["mean"], plain["mean"])
    dropped = plain["general"] & ~stored["general"]
    assert dropped.any()
    assert stored["drift"][dropped].min() > stored["drift"].quantile(0.2)


@torch.no_grad()
def test_published_features_are_frequent_on_general_text_and_drift_by_the_token(
    smoke, store, instruct
):
    options = ("features.frequency=general_text", "features.drift=token")
    config = smoke.config(
        f"features.instruct_model={instruct}", *options, "features.control=shuffled_prototypes"
    )
    (step,) = features.steps(config)
    artifact, upstream = build(step, store)
    stored = load_file(artifact / features.WEIGHTS)
    sae, source = load_sae(upstream["sae"] / "sae"), upstream["domains"]
    base_model, tokenizer = load_base(upstream["base"])
    moved = open_model(str(instruct))
    names = source.json("domains.json")["names"]
    drift = torch.zeros(sae.latents, dtype=torch.float64)
    for name in names:
        total, tokens = torch.zeros(sae.latents), 0
        for row in encode_chats(tokenizer, read_rows(source / f"train/{name}.jsonl"), 128):
            found = []
            for model in (base_model, moved):
                x = text_of(model, tokenizer, row.input_ids, 1)
                values, indices = sae.encode(x)
                found.append(torch.zeros(len(x), sae.latents).scatter(1, indices, values))
            total += (found[1] - found[0]).abs().sum(0)
            tokens += len(x)
        drift += (total / tokens).double() / len(names)
    torch.testing.assert_close(stored["drift"], drift, atol=1e-5, rtol=1e-3)
    path = source / "pretrain.jsonl"
    most = max(len(read_rows(source / f"train/{name}.jsonl")) for name in names)
    rows = general_text(source, tokenizer, 128, most)[:most]
    assert 0 < len(rows) < len(read_rows(path))
    active, tokens = torch.zeros(sae.latents), 0
    for row in rows:
        values, indices = sae.encode(text_of(base_model, tokenizer, row.input_ids, 1))
        active.index_add_(0, indices.flatten(), (values > 0).float().flatten())
        tokens += len(values)
    frequency = (active / tokens).double()
    torch.testing.assert_close(stored["general_frequency"], frequency, atol=2e-3, rtol=0)
    shuffled = [d for d in range(5) if (stored["prototypes"][d] * ~stored["domain"][d]).any()]
    assert len(shuffled) == 5


def test_other_weights_in_the_folder_are_another_artifact(smoke, instruct):
    config = smoke.config(f"features.instruct_model={instruct}")
    (before,) = features.steps(config)
    (again,) = features.steps(config)
    model = AutoModelForCausalLM.from_pretrained(instruct)
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(instruct)
    (after,) = features.steps(config)
    assert before.fingerprint == again.fingerprint != after.fingerprint


def refused(smoke, store, folder: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        run(features.steps(smoke.config(f"features.instruct_model={folder}")), store)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 48}, "has width 48; the base has 32"),
        ({"num_hidden_layers": 0}, "has 0 layers; the SAE reads site 1"),
        ({"vocab_size": 8}, "another vocabulary"),
    ],
)
def test_a_model_of_another_shape_is_refused(smoke, store, instruct, changes, reason):
    shape = Qwen3Config.from_pretrained(instruct).to_dict() | changes
    if "num_hidden_layers" in changes:
        shape["layer_types"] = []
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(instruct)
    refused(smoke, store, instruct, reason)


def test_a_model_with_other_words_is_refused(smoke, store, instruct):
    tokenizer = json.loads((instruct / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    (instruct / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert AutoTokenizer.from_pretrained(instruct).get_vocab()[one] == words[one]
    refused(smoke, store, instruct, "another vocabulary")


def test_a_model_that_is_not_there_is_named_by_its_key(smoke, store):
    refused(smoke, store, Path("/nowhere"), r"^features\.instruct_model=/nowhere cannot be loaded")
