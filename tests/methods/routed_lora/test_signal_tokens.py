"""Tokens that carry no signal, in the routing of forwards of every kind."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.data.packing import collate_packed
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.signal_tokens import ALL_TOKENS, SignalTokens
from steerlora.methods.routed_lora.health import RoutingHealth
from steerlora.methods.routed_lora.signals import prompt_signals
from steerlora.methods.saving import load_adapter, save_adapter

HEADER = [7, 8, 9, 7, 8, 10, 11]
RULE = SignalTokens(prefix=tuple(HEADER), special=(1, 2), first=True)
TEXTS = ([20, 21, 22, 23, 24], [30, 31, 32], [40, 41, 42, 43, 44, 45, 46, 47])
CASES = [
    {"context": "token"},
    {"context": "causal_mean"},
    {"context": "ema", "decay": 0.6},
    {"context": "causal_mean", "router": "mlp"},
    {"context": "causal_mean", "router": "prototype", "margin": 0.01},
    {"context": "ema", "prototypes": True},
]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=CASES, ids=lambda case: "_".join(map(str, case.values())))
def make(request, make_model, make_adapter):
    """``make(site, rule)``: a model in float64 and its adapter."""

    def make(site: int, rule: SignalTokens):
        model = make_model(torch.float64).eval()
        adapter = make_adapter(model, sites=(site,), **request.param)
        adapter.signal_tokens = rule
        adapter.saes[site].double()
        router = adapter.routers[str(site)]
        draws = torch.Generator().manual_seed(3)
        if router.fitted:
            for specialist in (0, 1, 2, None):
                width = router.prototypes.shape[1]
                router.fit(specialist, torch.rand(6, width, generator=draws).double())
        elif request.param.get("prototypes"):
            router.set_prototypes(torch.rand(router.prototypes.shape, generator=draws).double())
        return model, adapter

    return make


@torch.no_grad()
def test_a_header_leaves_routing_as_it_is_without(make):
    """At the embeddings, which do not depend on what stands before."""
    model, adapter = make(0, ALL_TOKENS)
    plain = []
    for text in TEXTS:
        model(input_ids=torch.tensor([text]))
        plain.append(adapter.routing()[0].gate[0])
    adapter.signal_tokens = RULE
    for text, expected in zip(TEXTS, plain, strict=True):
        model(input_ids=torch.tensor([[*HEADER, *text]]))
        torch.testing.assert_close(adapter.routing()[0].gate[0, len(HEADER) :], expected, **EXACT)


def rows() -> list[list[int]]:
    special = [[*text[:2], 1, *text[2:], 2, *text] for text in TEXTS]
    return [*([*HEADER, *text] for text in special), special[0]]


@torch.no_grad()
def test_padding_packing_and_order_change_nothing(make):
    model, adapter = make(1, RULE)
    single = []
    for row in rows():
        logits = model(input_ids=torch.tensor([row])).logits[0]
        single.append((logits, adapter.routing()[1].gate[0]))
    width = max(map(len, rows()))
    for side in ("left", "right"):
        for order in (range(4), (2, 0, 3, 1)):
            ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width).long()
            for place, index in enumerate(order):
                row = rows()[index]
                where = slice(width - len(row), width) if side == "left" else slice(len(row))
                ids[place, where], mask[place, where] = torch.tensor(row), 1
            places = (mask.cumsum(1) - 1).clamp_min(0)  # as generate() gives them
            logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
            gate = adapter.routing()[1].gate
            for place, index in enumerate(order):
                real = mask[place].bool()
                torch.testing.assert_close(gate[place][real], single[index][1], **EXACT)
                torch.testing.assert_close(logits[place][real], single[index][0], **EXACT)
    chats = [EncodedChat(row, 2) for row in rows()]
    packed = collate_packed([chats], [0], 0, sum(map(len, rows())) + 3)
    model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False)
    gate, start = adapter.routing()[1].gate[0], 0
    for row, (_, expected) in zip(rows(), single, strict=True):
        torch.testing.assert_close(gate[start : start + len(row)], expected, **EXACT)
        start += len(row)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[9, 1, 1], [2, 5, 4], [1] * 11])
def test_a_cache_changes_nothing(make, pieces):
    model, adapter = make(1, RULE)
    ids = torch.tensor([[*HEADER, 20, 1, 21, 22], [0, 0, 0, *HEADER, 20]])
    mask = torch.tensor([[1] * 11, [0] * 3 + [1] * 8])
    whole = model(input_ids=ids, attention_mask=mask).logits
    gate = adapter.routing()[1].gate
    cache, past, found, gates = DynamicCache(), 0, [], []
    for length in pieces:
        now = slice(past, past + length)
        given = {"input_ids": ids[:, now], "attention_mask": mask[:, : past + length]}
        found.append(model(**given, past_key_values=cache).logits)
        gates.append(adapter.routing()[1].gate)
        past += length
    real = mask.bool()
    torch.testing.assert_close(torch.cat(gates, 1)[real], gate[real], **EXACT)
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], **EXACT)


@pytest.mark.parametrize("name", ["shuffle", "randomize", "invert", "replace_dense"])
def test_interventions_leave_other_tokens_without_a_signal(name, make_model, make_adapter):
    model = make_model()
    adapter = make_adapter(model, context="token")
    adapter.signal_tokens = RULE
    ids = torch.tensor([[*HEADER, 20, 1, 21, 22]])
    with torch.no_grad():
        model(input_ids=ids)
        before = adapter.sites[1].features.values
        with adapter.intervention(name, seed=2):
            model(input_ids=ids)
    kept, after = RULE(ids, ids >= 0), adapter.sites[1].features.values
    assert not after[~kept].any()
    assert not before[~kept].any()
    assert after[kept].any(-1).all()
    if name == "shuffle":  # among those that carry one
        assert torch.equal(after.sum(-1)[kept].sort().values, before.sum(-1)[kept].sort().values)


def test_health_and_prototypes_pass_them_over(make_model, make_adapter):
    model = make_model()
    adapter = make_adapter(model, context="token", prototypes=True)
    adapter.signal_tokens = RULE
    rows = [EncodedChat([*HEADER, 20, 21, 1, 2, 30], 11)]
    found = prompt_signals(model, adapter, rows, 0)[1][0]
    with torch.no_grad():
        batch = collate(rows, [0], 0)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    features = adapter.sites[1].features
    # Of token 21, in another batch.
    torch.testing.assert_close(found[features.indices[0, 8]], features.values[0, 8])
    health = adapter.health(["law"], 0)
    health.update(batch, 0)
    gate, seen = adapter.routing()[1].gate[0, [7, 8, 11]], RoutingHealth(["law"], 4)
    seen.update(gate, torch.ones(3), torch.zeros(3))
    ours, theirs = health.result()["1"], seen.result()
    assert ours["tokens"] == 3
    assert ours["gate_by_domain"] == theirs["gate_by_domain"]


def test_parts_of_a_batch_have_the_share_of_their_tokens_with_a_signal():
    rows = [EncodedChat([*HEADER, 20, 21, 22], 9), EncodedChat([*HEADER, 20], 7)]
    batch = collate(rows, [0, -1], 0, signal_tokens=RULE)
    parts = [batch.part(index, 2) for index in range(2)]
    assert [part.shares.signal for part in parts] == [2 * 3 / 4, 2 * 1 / 4]
    assert [part.shares.owned for part in parts] == [2, 0]


def test_the_rule_is_saved_with_the_adapter(make_model, make_adapter, tmp_path):
    model = make_model()
    adapter = make_adapter(model, signal="dense")
    adapter.signal_tokens = RULE
    adapter.remove()
    save_adapter(adapter, tmp_path, base_fingerprint=model_fingerprint(model))
    assert load_adapter(model, tmp_path).signal_tokens == RULE
