"""The memory policy fires where it should and only there, and a resumed training decides alike.

Most tests put routing and features where a forward would have left them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.training import StopAt, Stopped, method_module
from helpers.training import train as train_module
from lightning.pytorch.callbacks import Callback

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.methods.module import MethodModule
from steerlora.methods.routed_lora.config import MemoryConfig
from steerlora.methods.routed_lora.memory import MemoryPolicy
from steerlora.methods.routed_lora.routing import Routing
from steerlora.saes.sparse import SparseFeatures

B, S, E, R, K, LATENTS = 2, 6, 4, 3, 5, 64
EVERY = 10
THRESHOLDS = {
    "spawn_confidence": 0.5,
    "spawn_similarity": 0.8,
    "merge_similarity": 0.95,
    "prune_usage": 0.2,
}
NEVER = {
    "spawn_confidence": 0.0,
    "spawn_similarity": 0.0,
    "merge_similarity": 1.0,
    "prune_usage": 0.0,
}


@pytest.fixture
def adapter(make_model, make_adapter):
    """Four specialists, the first two active, top-2."""
    return make_adapter(make_model(), active=2)


def policy_of(
    adapter, domain: str = "law", protected=(), module=None, position: int = 0, **changes
) -> MemoryPolicy:
    config = MemoryConfig(**{"every": EVERY, **NEVER, **changes})
    return MemoryPolicy(
        adapter, config, domain=domain, module=module, position=position, protected=protected
    )


def topic(number: int, scale: float = 1.0) -> SparseFeatures:
    """Features of every token of a text on one topic: topics share no latent."""
    indices = torch.arange(K).expand(B, S, K) + number * K
    return SparseFeatures(scale * torch.arange(1.0, K + 1).expand(B, S, K), indices)


def gates(*weights: float) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float).expand(B, S, len(weights))


def see(policy: MemoryPolicy, gate: torch.Tensor, features: SparseFeatures, mask=None) -> None:
    """One forward of every site."""
    adapter = policy.adapter
    adapter.forward_state.attention_mask = mask
    for site in adapter.sites.values():
        site.found.routing = Routing(gate, torch.ones(*gate.shape[:-1], R))
        site.found.features = features
    policy.on_before_backward(None, None, torch.zeros(()))


def look(policy: MemoryPolicy, step: int = EVERY, optimizers=()) -> list[dict]:
    """The events of a look."""
    before = len(policy.events)
    trainer = SimpleNamespace(
        global_step=step,
        max_steps=5 * EVERY,
        accumulate_grad_batches=1,
        strategy=None,
        optimizers=optimizers or [SimpleNamespace(state={})],
    )
    policy.on_train_batch_start(trainer, None, None, 0)
    return policy.events[before:]


def active(policy: MemoryPolicy) -> list[int]:
    return policy.active.nonzero().flatten().tolist()


EVEN, SURE = gates(0.5, 0.5, 0, 0), gates(0.98, 0.02, 0, 0)
SPAWN = {"spawn_confidence": 0.5, "spawn_similarity": 0.8}


# Spawn


def test_a_new_topic_that_the_gate_is_unsure_of_spawns_a_specialist(adapter):
    policy = policy_of(adapter, **SPAWN)
    see(policy, EVEN, topic(0))
    assert look(policy) == []  # nothing known yet that it could be new against
    see(policy, EVEN, topic(1))
    assert look(policy, 2 * EVERY) == [
        {
            "step": 20,
            "domain": "law",
            "event": "spawn",
            "specialists": [2],
            "why": "confidence 0.000 < 0.5, similarity 0.000 < 0.8",
        }
    ]
    assert active(policy) == [0, 1, 2]
    rows = slice(2 * R, 3 * R)
    for layer in adapter.layers.values():
        assert layer.A[rows].any()


@pytest.mark.parametrize(
    ("gate", "number", "inactive"),
    [(SURE, 1, True), (EVEN, 0, True), (EVEN, 1, False)],
    ids=["the gate is sure", "the topic is known", "none is left"],
)
def test_otherwise_none_is_spawned(adapter, gate, number, inactive):
    adapter.active[2:] = not inactive
    policy = policy_of(adapter, **SPAWN)
    see(policy, EVEN, topic(0))
    look(policy)
    see(policy, gate, topic(number))
    assert look(policy, 2 * EVERY) == []
    assert len(active(policy)) == (2 if inactive else 4)


@pytest.mark.parametrize("only_one", [True, False])
def test_a_gate_without_a_choice_leaves_it_to_novelty(make_model, make_adapter, only_one):
    """Of the published thresholds some could never be passed: a one-hot gate is always sure."""
    adapter = make_adapter(make_model(), active=1 if only_one else 2, top_k=2 if only_one else 1)
    policy = policy_of(adapter, **SPAWN)
    see(policy, gates(1, 0, 0, 0), topic(0))
    look(policy)
    see(policy, gates(1, 0, 0, 0), topic(0))
    assert look(policy, 2 * EVERY) == []
    see(policy, gates(1, 0, 0, 0), topic(1))
    assert [event["event"] for event in look(policy, 3 * EVERY)] == ["spawn"]


def test_what_a_specialist_has_seen_is_no_longer_new(adapter):
    policy = policy_of(adapter, **SPAWN)
    see(policy, EVEN, topic(0))
    look(policy)
    for step in (2, 3, 4):
        see(policy, EVEN, topic(1))
        look(policy, step * EVERY)
    # The second look made topic 1 half of what each has seen; later it is most of it.
    assert [event["step"] for event in policy.events] == [20, 30]
    similarities = [float(event["why"].split("similarity ")[1][:5]) for event in policy.events]
    assert similarities == pytest.approx([0.0, 0.5**0.5], abs=1e-3)


# Merge


@pytest.mark.parametrize("others", [(), (3,)])
def test_specialists_of_one_topic_are_merged(adapter, others):
    """Even where there are no others: centred on their mean, two would always be opposite."""
    adapter.active[list(others)] = True
    policy = policy_of(adapter, merge_similarity=0.95)
    see(policy, gates(0.75, 0.25, 0, 0), topic(0))
    for specialist in others:
        see(policy, torch.eye(E)[specialist].expand(B, S, E), topic(1))
    before = {
        name: [
            layer.B[:, e * R : (e + 1) * R].detach() @ layer.A[e * R : (e + 1) * R].detach()
            for e in range(E)
        ]
        for name, layer in adapter.layers.items()
    }
    events = look(policy)
    assert [(event["event"], event["specialists"]) for event in events] == [("merge", [0, 1])]
    assert events[0]["why"] == "similarity 1.000 > 0.95"
    assert active(policy) == [0, *others]
    for name, layer in adapter.layers.items():
        U, s, Vh = torch.linalg.svd(0.75 * before[name][0] + 0.25 * before[name][1])
        merged = layer.B[:, :R] @ layer.A[:R]
        torch.testing.assert_close(merged, U[:, :R] * s[:R] @ Vh[:R], atol=1e-5, rtol=0)
        assert not layer.B[:, R : 2 * R].any()
        assert layer.A[R : 2 * R].abs().max() <= layer.A.shape[1] ** -0.5
        torch.testing.assert_close(layer.B[:, 3 * R :] @ layer.A[3 * R :], before[name][3])


def test_the_weights_of_a_merge_are_all_the_usage_so_far(adapter):
    policy = policy_of(adapter, merge_similarity=0.95)
    see(policy, gates(1, 0, 0, 0), topic(0))
    see(policy, gates(1, 0, 0, 0), topic(0))
    look(policy)
    B_first, B_second = (
        next(iter(adapter.layers.values())).B[:, part].detach().clone()
        for part in (slice(R), slice(R, 2 * R))
    )
    A = next(iter(adapter.layers.values())).A[: 2 * R].detach().clone()
    see(policy, gates(0, 1, 0, 0), topic(0))
    assert look(policy, 2 * EVERY)
    expected = 2 / 3 * B_first @ A[:R] + 1 / 3 * B_second @ A[R:]
    layer = next(iter(adapter.layers.values()))
    U, s, Vh = torch.linalg.svd(expected)
    torch.testing.assert_close(
        layer.B[:, :R] @ layer.A[:R], U[:, :R] * s[:R] @ Vh[:R], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("case", ["other topics", "protected", "not used"])
def test_otherwise_none_are_merged(adapter, case):
    policy = policy_of(adapter, merge_similarity=0.95, protected=[1] * (case == "protected"))
    see(policy, gates(1, 0, 0, 0), topic(0))
    if case != "not used":
        see(policy, gates(0, 1, 0, 0), topic(1 if case == "other topics" else 0))
    assert look(policy) == []
    assert active(policy) == [0, 1]


def test_the_most_similar_pair_is_merged_one_a_look(adapter):
    adapter.active[:] = True
    policy = policy_of(adapter, merge_similarity=0.5)
    half = SparseFeatures(topic(0).values * torch.tensor([0, 1, 1, 1, 1.0]), topic(0).indices)
    for specialist, features in ((0, topic(1)), (1, half), (2, topic(0)), (3, topic(1, scale=3.0))):
        see(policy, torch.eye(E)[specialist].expand(B, S, E), features)
    assert [event["specialists"] for event in look(policy)] == [[0, 3]]
    see(policy, torch.eye(E)[1].expand(B, S, E), half)
    assert [event["specialists"] for event in look(policy, 2 * EVERY)] == [[1, 2]]


# Prune


def test_a_specialist_that_hardly_any_token_uses_is_pruned(adapter):
    adapter.active[2] = True
    policy = policy_of(adapter, prune_usage=0.2)
    see(policy, gates(0.5, 0.45, 0.05, 0), topic(0))
    events = look(policy)
    assert [(event["event"], event["specialists"]) for event in events] == [("prune", [2])]
    assert events[0]["why"] == "usage 0.050 < 0.067"
    assert active(policy) == [0, 1]
    for layer in adapter.layers.values():
        assert not layer.B[:, 2 * R : 3 * R].any()


def test_a_merged_specialist_has_what_both_had(adapter):
    adapter.active[:] = True
    policy = policy_of(adapter, merge_similarity=0.95, prune_usage=0.2)
    see(policy, gates(0.5, 0.5, 0, 0), topic(0))
    for specialist in (2, 3):
        for _ in range(6):
            see(policy, torch.eye(E)[specialist].expand(B, S, E), topic(specialist))
    # Of 13 forwards each has a half: 0.038, which alone is less than 0.2 / 4.
    assert [event["event"] for event in look(policy)] == ["merge"]
    lasting = policy.state_dict()["tensors"]
    assert lasting["lasting.usage"].tolist() == [B * S, 0, 6 * B * S, 6 * B * S]
    assert lasting["lasting.features.1"][:K, 0].tolist() == [B * S * n for n in range(1, K + 1)]


@pytest.mark.parametrize("case", ["used enough", "top-k must remain", "protected"])
def test_otherwise_none_is_pruned(adapter, case):
    adapter.active[2] = case != "top-k must remain"
    policy = policy_of(adapter, prune_usage=0.2, protected=[2] * (case == "protected"))
    used = case == "used enough"
    see(policy, gates(0.53, 0.40, 0.07, 0) if used else gates(0.99, 0.01, 0, 0), topic(0))
    if case == "protected":
        see(policy, gates(0.5, 0.5, 0, 0), topic(0))
    assert look(policy) == []


def test_the_least_used_goes_first_until_top_k_are_left(adapter):
    adapter.active[:] = True
    policy = policy_of(adapter, prune_usage=0.2)
    see(policy, gates(0.03, 0.02, 0.94, 0.01), topic(0))
    assert [event["specialists"] for event in look(policy)] == [[3], [1]]
    assert active(policy) == [0, 2]


def test_a_new_specialist_is_judged_after_a_look_of_its_own(adapter):
    policy = policy_of(adapter, **SPAWN, prune_usage=0.2)
    see(policy, EVEN, topic(0))
    look(policy)
    see(policy, EVEN, topic(1))
    assert [event["event"] for event in look(policy, 2 * EVERY)] == ["spawn"]
    see(policy, EVEN, topic(0))
    see(policy, EVEN, topic(1))
    events = look(policy, 3 * EVERY)
    assert [(event["event"], event["specialists"]) for event in events] == [("prune", [2])]


def test_what_was_seen_of_a_specialist_that_is_gone_is_forgotten(adapter):
    adapter.active[2] = True
    policy = policy_of(adapter, **SPAWN, prune_usage=0.2)
    see(policy, gates(0, 0, 1, 0), topic(2))
    see(policy, gates(0.6, 0.4, 0, 0), topic(0))
    look(policy)
    see(policy, gates(0.6, 0.4, 0, 0), topic(0))
    assert [event["event"] for event in look(policy, 2 * EVERY)] == ["prune"]
    # The same number comes back for another topic, and knows nothing of the one it had.
    for step, number, gate in ((3, 5, EVEN), (4, 2, gates(0.3, 0.3, 0.4, 0))):
        see(policy, gate, topic(number))
        assert [event["event"] for event in look(policy, step * EVERY)] == ["spawn"]
    assert active(policy) == [0, 1, 2, 3]


# What every threshold can be compared with


def test_every_threshold_can_be_passed_on_either_side(adapter):
    """The published thresholds lay outside what their quantities could be."""

    def whys(gate, features, number, **thresholds) -> list[str]:
        adapter.active[:] = torch.tensor([True, True, False, False])
        policy = policy_of(adapter, **thresholds)
        see(policy, EVEN, topic(0))
        look(policy)
        see(policy, gate, features)
        return [event["why"] for event in look(policy, 2 * EVERY)]

    novel = {"spawn_similarity": 0.999}
    assert whys(EVEN, topic(1), 1, spawn_confidence=0.01, **novel)
    assert whys(gates(1, 0, 0, 0), topic(1), 1, spawn_confidence=0.99, **novel) == []
    unsure = {"spawn_confidence": 0.5}
    assert whys(EVEN, topic(1), 1, spawn_similarity=0.01, **unsure)
    assert whys(EVEN, topic(0), 0, spawn_similarity=0.99, **unsure) == []


def slow_figures(gate, features, mask, top_k, active) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Usage [E], confidence and prototypes [E, N], token by token in float64."""
    usage, prototypes = torch.zeros(E).double(), torch.zeros(E, LATENTS).double()
    entropies = []
    for b, s in mask.nonzero().tolist():
        modules = gate[b, s].double().reshape(-1, E)
        usage += modules.mean(0)
        entropies += [-(g[g > 0] * g[g > 0].log()).sum() for g in modules]
        for value, latent in zip(features.values[b, s], features.indices[b, s], strict=True):
            prototypes[:, latent] += modules.mean(0) * value.double()
    confidence = 1 - torch.stack(entropies).mean() / torch.tensor(float(min(top_k, active))).log()
    return usage / mask.sum(), float(confidence), prototypes


@pytest.mark.parametrize("modules", [(), (7,)])
def test_figures_are_those_of_real_tokens_one_by_one(adapter, modules):
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(B, S, *modules, E, generator=generator)
    gate[..., 2:] = 0
    gate = gate / gate.sum(-1, keepdim=True)
    indices = torch.rand(B, S, LATENTS, generator=generator).topk(K).indices
    features = SparseFeatures(torch.rand(B, S, K, generator=generator), indices)
    mask = (torch.arange(S) < torch.tensor([6, 3])[:, None]).long()
    policy = policy_of(adapter, **SPAWN)
    see(policy, gate, features, mask)
    look(policy)
    usage, confidence, prototypes = slow_figures(gate, features, mask, 2, 2)
    state = policy.state_dict()["tensors"]
    torch.testing.assert_close(
        (state["lasting.usage"] / mask.sum()).double(), usage, atol=1e-6, rtol=0
    )
    found = state["lasting.features.1"].t().double()
    torch.testing.assert_close(found, prototypes, atol=1e-5, rtol=0)
    see(policy, gate, topic(12), mask)
    why = look(policy, 2 * EVERY)[0]["why"]
    assert why.startswith(f"confidence {confidence:.3f} < 0.5, similarity")
    # Rows in another order, and more padding with anything in it.
    wider = torch.cat([gate.flip(0), torch.rand(B, 4, *modules, E)], 1)
    parts = [torch.cat([part.flip(0), part[:, :4]], 1) for part in features]
    policy = policy_of(adapter, **SPAWN)
    see(policy, wider, SparseFeatures(*parts), torch.cat([mask.flip(0), mask[:, :4] * 0], 1))
    look(policy)
    for name, value in policy.state_dict()["tensors"].items():
        torch.testing.assert_close(value, state[name], msg=name)


def test_similarity_is_the_mean_over_sites(make_model, make_adapter):
    adapter = make_adapter(make_model(), sites=(1, 2), active=2)
    policy = policy_of(adapter, **SPAWN)
    see(policy, EVEN, topic(0))
    look(policy)
    adapter.forward_state.attention_mask = None
    for site, number in zip(adapter.sites.values(), (0, 1), strict=True):
        site.found.routing, site.found.features = Routing(EVEN, torch.ones(B, S, R)), topic(number)
    policy.on_before_backward(None, None, torch.zeros(()))
    assert look(policy, 2 * EVERY)[0]["why"] == "confidence 0.000 < 0.5, similarity 0.500 < 0.8"


# One policy a module


EACH = {"per_module": True, "memory": MemoryConfig(enabled=True, per_module=True)}


def test_a_policy_of_a_module_sees_and_changes_that_module_alone(make_model, make_adapter):
    adapter = make_adapter(make_model(), active=3, **EACH)
    names = adapter.modules_of(1)
    assert adapter.active.shape == (len(names), E)
    own, other = (
        policy_of(adapter, module=name, prune_usage=0.5, protected=[0, 1]) for name in names[1:3]
    )
    before = {name: layer.B.clone() for name, layer in adapter.layers.items()}
    gate = gates(0.4, 0.3, 0.3, 0).unsqueeze(2).repeat(1, 1, len(names), 1)
    gate[:, :, 1] = torch.tensor([0.6, 0.39, 0.01, 0.0])
    for policy in (own, other):
        see(policy, gate, topic(0))
    assert look(other) == []
    (event,) = look(own)
    assert (event["event"], event["specialists"]) == ("prune", [2])
    assert event["why"].startswith(f"{names[1]}: usage 0.010")
    assert active(own) == [0, 1]
    assert active(other) == [0, 1, 2]
    for name, layer in adapter.layers.items():
        cleared = ~layer.B.view(-1, E, R).permute(1, 0, 2).flatten(1).any(1)
        assert cleared.tolist() == [False, False, name == names[1], False]
        assert name == names[1] or layer.B.equal(before[name])


def test_routing_keeps_to_each_module_s_active_specialists(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model, **EACH)
    adapter.active[2, :2] = False
    ids, mask = tokens([6, 4])
    model(input_ids=ids, attention_mask=mask)
    gate = adapter.sites[1].routing.gate
    assert not gate[:, :, 2, :2].any()
    assert gate[:, :, 2, 2:].any()
    assert gate[:, :, 1, :2].any()
    assert adapter.available().all()
    with adapter.intervention("uniform_gate"):
        model(input_ids=ids, attention_mask=mask)
    assert adapter.sites[1].routing.gate[0, 0, 2].tolist() == [0, 0, 0.5, 0.5]


# Warm-up


def test_nothing_is_decided_in_the_warm_up_and_what_was_seen_counts(adapter):
    policy = policy_of(adapter, warmup=2 * EVERY, prune_usage=0.9)
    see(policy, SURE, topic(0))
    adapter.active[2] = True
    assert look(policy, EVERY) == []
    see(policy, gates(0.5, 0.5, 0, 0), topic(0))
    (event,) = look(policy, 2 * EVERY)
    assert event["specialists"] == [2]
    assert policy.state_dict()["tensors"]["lasting.usage"].sum() == pytest.approx(2 * B * S)


def test_a_sequence_has_one_warm_up(adapter):
    """The third domain begins after two times fifty steps."""
    adapter.active[2] = True
    early = policy_of(adapter, warmup=111, prune_usage=0.9, position=2)
    see(early, EVEN, topic(0))
    assert look(early, EVERY) == []
    assert look(early, 2 * EVERY)


# State


def test_the_optimizer_forgets_what_it_knew_of_changed_specialists(adapter):
    optimizer = torch.optim.AdamW(adapter.layers.parameters(), lr=1e-3)
    for parameter in adapter.layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    policy = policy_of(adapter, merge_similarity=0.95)
    adapter.active[2] = True
    see(policy, EVEN, topic(0))
    see(policy, gates(0, 0, 1, 0), topic(1))
    assert look(policy, optimizers=[optimizer])
    for layer in adapter.layers.values():
        moments = optimizer.state[layer.A]["exp_avg"], optimizer.state[layer.B]["exp_avg"].t()
        for moment in moments:
            assert not moment[: 2 * R].any()
            assert moment[2 * R :].all()


def test_its_sums_follow_the_module_to_its_device(adapter):
    policy = policy_of(adapter)
    see(policy, EVEN, topic(0))
    look(policy)
    see(policy, EVEN, topic(0))
    policy.on_train_start(None, SimpleNamespace(device=torch.device("meta")))
    held = policy.state_dict()["tensors"].values()
    assert len(held) == 6
    assert {tensor.device.type for tensor in held} == {"meta"}


def test_it_looks_at_its_steps_only_and_never_twice_at_the_same_tokens(adapter):
    policy = policy_of(adapter, **SPAWN)
    see(policy, EVEN, topic(0))
    assert look(policy, EVERY - 1) == []
    assert "window.usage" in policy.state_dict()["tensors"]
    look(policy, EVERY)
    assert set(policy.state_dict()["tensors"]) == {"lasting.usage", "lasting.features.1"}
    assert look(policy, 2 * EVERY) == []


def test_the_next_domain_takes_over_what_lasts(adapter):
    first = policy_of(adapter, **SPAWN)
    see(first, EVEN, topic(0))
    look(first)
    see(first, EVEN, topic(1))  # since its last look
    state = first.state_dict()
    after = policy_of(adapter, **SPAWN, domain="math")
    after.load_state_dict(state)
    see(after, EVEN, topic(0))
    assert look(after) == []  # and not half new
    see(after, EVEN, topic(2))
    assert [(event["domain"], event["event"]) for event in look(after)] == [("math", "spawn")]
    assert state["events"] == []
    json.dumps(after.state_dict()["events"])
    again = policy_of(adapter, **SPAWN)
    again.load_state_dict(state)
    assert "window.usage" in again.state_dict()["tensors"]


@pytest.mark.parametrize(
    "changes", [{"signal": "none"}, {"signal": "dense"}, {"router": "prototype"}]
)
def test_adapters_that_it_can_do_nothing_for_are_refused(make_model, make_adapter, changes):
    adapter = make_adapter(make_model(), **changes)
    with pytest.raises(ValueError, match="needs a learnt router of SAE features"):
        policy_of(adapter)


# In training

STEPS = 14


def batch(step: int) -> ChatBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedChat(torch.randint(1, 60, (7,), generator=generator).tolist(), 2) for _ in range(24)
    ]
    return ChatBatches(rows, [0] * 24, batch_size=4, pad_token_id=0, seed=0)(step)


@pytest.fixture
def run(make_model, make_adapter):
    """``run(directory, *callbacks)``: the adapter and its policy, trained where all can fire."""

    def train(
        directory: Path, *before: Callback, each: bool = False
    ) -> tuple[MethodModule, MemoryPolicy]:
        model = make_model()
        adapter = make_adapter(model, active=2, **(EACH if each else {}))
        settings = TrainerConfig(batch_size=4, learning_rate=1e-2, checkpoint_seconds=1e-9)
        made = method_module(model, adapter, trainer=settings, steps=STEPS)
        thresholds = {"spawn_confidence": 1.0, "spawn_similarity": 1.0, "merge_similarity": 0.7}
        policies = [
            policy_of(adapter, module=module, every=4, prune_usage=0.8, **thresholds)
            for module in (adapter.layers if each else [None])
        ]
        policy = policies[-1]
        try:
            train_module(made, batch, directory, STEPS, [*before, *policies])
        except Stopped:
            return made, policy
        assert not any(isinstance(callback, StopAt) for callback in before)
        return made, policy

    return train


@pytest.mark.parametrize(
    ("stop", "each"), [(4, False), (5, False), (8, False), (11, False), (5, True)]
)
def test_a_resumed_training_decides_as_an_unbroken_one(run, tmp_path, stop, each):
    """Stopped before a look that was due, and between two; one policy, or one a module."""
    unbroken, policy = run(tmp_path / "a", each=each)
    assert {event["event"] for event in policy.events} >= {"spawn", "merge"}
    assert {event["step"] for event in policy.events} <= {4, 8, 12}
    _, stopped = run(tmp_path / "b", StopAt(stop), each=each)
    assert len(stopped.events) < len(policy.events)
    resumed, again = run(tmp_path / "b", each=each)
    assert again.events == policy.events
    for name, value in unbroken.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name


def test_spawned_specialists_train_and_inactive_ones_rest(run, tmp_path):
    made, policy = run(tmp_path)
    spawned, merged = (
        [e["specialists"] for e in policy.events if e["event"] == event and e["step"] == 12]
        for event in ("spawn", "merge")
    )
    kept, retired = merged[0]
    for layer in made.method.layers.values():
        columns = layer.B.detach().unflatten(1, (E, R)).transpose(0, 1)
        # Two steps later: a first moment left behind would have moved it.
        assert not columns[retired].any()
        assert columns[kept].any()
    assert spawned
    assert made.method.active[spawned[0][0]]
