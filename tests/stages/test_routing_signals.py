"""The stage that compares what tells domains apart."""

from __future__ import annotations

import pytest
import torch

from steerlora.cli import compose
from steerlora.data.chat import EncodedChat
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.progress import SilentProgress
from steerlora.engine.run import run
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.evaluation.records import read_record
from steerlora.evaluation.routing_signals import (
    CONDITIONS,
    HIDDEN,
    LAST,
    PROJECTION,
    SAE,
    SIGNALS,
    UNTRAINED,
    WORDS,
    RoutingSignals,
)
from steerlora.lm.decoder import residual_streams
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.base import SiteSAE, Sources
from steerlora.saes.saelens import load_sae
from steerlora.stages import common, routing_signals, sae_training
from steerlora.stages.routing_signals_measures import (
    SignalReader,
    accuracy,
    likeness,
    ordinary_tokens,
    with_noise,
)

SMALL = ("rows=8", "test_rows=4", "domains=3")
LEVELS = "{tokens:[1,4],shared:[0,1],domains:[2,3],noise:[0,0.5],rows:[2,8]}"
RULE = SignalTokens(special=(7,), first=True)


def steps_of(smoke, *changes: str):
    overrides = [*smoke.overrides, "stage=routing_signals", "method=sc_lora_context", *changes]
    return STAGES["routing_signals"].steps(
        compose.load(overrides), lambda *more: compose.load([*overrides, *more])
    )


def settings(*given: str) -> list[str]:
    return [f"stage.settings.{one}" for one in given]


@pytest.fixture(scope="module")
def base(smoke):
    """(model, tokenizer, SAE) of the smoke experiment."""
    (step,) = steps_of(smoke)
    found = run([step.inputs["base"], step.inputs["sae"]], ArtifactStore(smoke.root))
    model, tokenizer = common.load_base(found[step.inputs["base"]])
    return model, tokenizer, load_sae(found[step.inputs["sae"]] / sae_training.FOLDER)


def texts(count: int) -> list[EncodedChat]:
    drawn = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, 15, (count,), generator=drawn).tolist()
    return [
        EncodedChat(torch.randint(5, 60, (length,), generator=drawn).tolist(), 0)
        for length in lengths
    ]


def test_signals_are_those_of_each_text_read_alone(base, monkeypatch):
    """Batches and padding change nothing; a mean is over the first tokens that carry a signal."""
    monkeypatch.setattr("steerlora.stages.routing_signals_measures.BATCH_SIZE", 3)
    model, _, sae = base
    read = SignalReader(model, sae, 1, RULE, 0, seed=5)
    rows, last = texts(8), model.config.num_hidden_layers
    found = read(rows, [2, None])
    assert list(found) == [SAE, UNTRAINED, PROJECTION, HIDDEN, LAST, WORDS]
    assert set(found) == set(SIGNALS)
    for place, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        streams = residual_streams(model, ids, torch.ones_like(ids), [0, 1, last])
        norm = streams[1] / (streams[1].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        tokens = {
            SAE: sae.encode(streams[1]).dense(sae.latents),
            UNTRAINED: sae.untrained_like(5).encode(streams[1]).dense(sae.latents),
            PROJECTION: norm @ read.projection,
            HIDDEN: norm,
            LAST: model.model.norm(streams[last]),
            WORDS: model.get_input_embeddings()(ids),
        }
        counted = [at for at, token in enumerate(row.input_ids) if at and token != 7]
        for name, every in tokens.items():
            for length, chosen in enumerate((counted[:2], counted)):
                expected = every[0, chosen].mean(0) if chosen else torch.zeros(every.shape[-1])
                torch.testing.assert_close(
                    found[name][place, length], expected.detach(), atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("method", ["sc_lora_context", "epi", "any_ssr"])
def test_a_rule_tells_apart_what_lies_apart_and_guesses_otherwise(smoke, method):
    drawn = torch.Generator().manual_seed(0)
    config = smoke.config(f"method={method}").method

    def of(centres: torch.Tensor) -> tuple[dict, dict]:
        rows = centres[:, None] + 0.3 * torch.randn(4, 60, 6, generator=drawn)
        return {d: own[:40] for d, own in enumerate(rows)}, {
            d: own[40:, None] for d, own in enumerate(rows)
        }

    apart = 20 + 5 * torch.eye(6)[:4]
    assert accuracy(config, *of(apart), 0) == [1.0]
    assert accuracy(config, *of(torch.full((4, 6), 20.0)), 0)[0] < 0.6
    # The unit of the signal has no say, and every length is scored by itself.
    train, test = of(apart)
    both = {d: torch.cat([own, torch.zeros_like(own)], 1) for d, own in test.items()}
    scaled = [{d: 1e3 * own for d, own in part.items()} for part in (train, both)]
    assert accuracy(config, train, both, 0) == accuracy(config, *scaled, 0) == [1.0, 0.25]


def test_the_rule_is_the_method_s_own(base, smoke):
    """Fitted to the same texts, the attached method is as near to each domain."""
    model, tokenizer, sae = base
    config = smoke.config("method=sc_lora_context", "method.null_specialist=false").method
    rows = texts(30)
    signals = SignalReader(model, sae, 1, RULE, tokenizer.pad_token_id, 0)(rows, [None])[SAE][:, 0]
    method = config.build(model, Sources(saes={1: SiteSAE(sae)}, signal_tokens=RULE), 0)
    rule = config.domain_router(sae.latents, config.specialists, 0)
    for router in (rule, method.routers["1"]):
        router.fit(0, signals[:10])
        router.fit(1, signals[10:20])
    try:
        longest = sorted(rows[20:], key=lambda row: len(row.input_ids))
        asked = [EncodedChat([*row.input_ids, 9], len(row.input_ids)) for row in longest]
        own = method.nearness(asked, tokenizer.pad_token_id)[1]
    finally:
        method.remove()
    order = sorted(range(20, 30), key=lambda at: len(rows[at].input_ids))
    found = rule.nearness(signals[order])
    torch.testing.assert_close(found[:, :2], own[:, :2], atol=1e-4, rtol=1e-4)


def test_noise_spares_what_carries_no_signal():
    words = torch.arange(100, 200)
    rows = [EncodedChat([150, 7, *range(100, 150)], 0)] * 40
    assert with_noise(rows, 0.0, RULE, words, 0) == rows
    changed = with_noise(rows, 0.5, RULE, words, 0)
    assert {tuple(row.input_ids[:2]) for row in changed} == {(150, 7)}
    others = [
        a != b for r, c in zip(rows, changed, strict=True)
        for a, b in zip(r.input_ids[2:], c.input_ids[2:], strict=True)
    ]  # fmt: skip
    assert sum(others) / len(others) == pytest.approx(0.5, abs=0.03)
    assert changed == with_noise(rows, 0.5, RULE, words, 0) != with_noise(rows, 0.5, RULE, words, 1)
    kept = with_noise(rows, 1.0, RULE, torch.arange(300, 400), 0)
    assert kept == rows  # none of the tokens is a word


def test_likeness_is_the_cosine_of_counts():
    one, other = [EncodedChat([1, 1, 2], 0)], [EncodedChat([1], 0), EncodedChat([3], 0)]
    assert likeness(one, other, 5) == pytest.approx(2 / (5 * 2) ** 0.5)


def test_ordinary_tokens_are_no_special_ones(base):
    _, tokenizer, _ = base
    words = ordinary_tokens(tokenizer).tolist()
    assert set(tokenizer.all_special_ids).isdisjoint(words)
    assert len(words) > 200


def test_made_up_domains_are_measured_in_every_condition(smoke):
    asked = settings(*SMALL, f"levels={LEVELS}")
    (step,) = steps_of(smoke, *asked)
    found = run([step], ArtifactStore(smoke.root), progress=SilentProgress())
    record = read_record(found[step] / routing_signals.RESULT, RoutingSignals)
    assert list(record.levels) == list(CONDITIONS)
    for name, by_signal in record.accuracy.items():
        assert set(by_signal) == set(SIGNALS)
        assert {len(values) for values in by_signal.values()} == {len(record.levels[name])}
        assert all(0 <= value <= 1 for values in by_signal.values() for value in values)
    assert record.chance["domains"] == [1 / 2, 1 / 3]
    assert record.best["shared"] == [1.0, pytest.approx(1 / 3)]
    assert record.items == 12
    assert record.pairs == ()
    # The same texts, from as many rows, without noise: one figure.
    assert record.accuracy["noise"][HIDDEN][0] == record.accuracy["rows"][HIDDEN][1]
    assert record.accuracy["noise"][SAE][0] == record.accuracy["domains"][SAE][1]


def test_the_domains_of_the_configuration_are_told_apart_pair_by_pair(smoke):
    asked = settings("made=false", "rows=8", "test_rows=4", "levels={tokens:[1,4],domains:[2,5]}")
    (step,) = steps_of(smoke, *asked)
    found = run([step], ArtifactStore(smoke.root), progress=SilentProgress())
    record = read_record(found[step] / routing_signals.RESULT, RoutingSignals)
    names = smoke.config().domains.names
    assert [pair.domains for pair in record.pairs][:2] == [tuple(names[:2]), (names[0], names[2])]
    assert len(record.pairs) == 10
    assert all(0 < pair.likeness <= 1 for pair in record.pairs)
    assert record.best == {}
    assert record.items == 20


def test_replicates_have_texts_bases_and_saes_of_their_own(smoke):
    study = ("study.name=x", "study.stage=routing_signals", "study.seeds=[3,4]")
    found = steps_of(smoke, *study)
    assert [step.config.seed for step in found] == [3, 4]
    for name in ("base", "sae"):
        assert len({step.inputs[name].fingerprint for step in found}) == 2
    with pytest.raises(UserError, match="add adapter"):
        steps_of(smoke, *study, "study.vary=[base]")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["method=lora"], "method=lora does not route by domain"),
        (settings("+row=3"), "stage.settings.row: did you mean"),
        (settings("made=1"), "stage.settings.made=1"),
        (settings("domains=17"), "from 2 to 16 are made up"),
        (settings("rows=1"), "a whole number from 2"),
        (settings("shared=1.5"), "a number from 0 to 1"),
        (settings("levels={token:[1,2]}"), "levels.token: did you mean"),
        (settings("levels={tokens:[2,1]}"), "rising"),
        (settings("levels={tokens:[0,1]}"), "tokens from 1"),
        (settings("levels={domains:[2,99]}"), "there are 16 domains at most"),
        (settings("levels={noise:[0,2]}"), "a number from 0 to 1"),
        (settings("made=false", "levels={shared:[0,1]}"), "only made-up domains share sentences"),
        (settings("made=false", "levels={domains:[2,6]}"), "there are 5 domains at most"),
    ],
)
def test_what_makes_no_sense_is_refused(smoke, changes, says):
    changes = [one.replace("stage.settings.+", "+stage.settings.") for one in changes]
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        steps_of(smoke, *changes)
