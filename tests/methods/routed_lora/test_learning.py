"""What routed specialists do around a task: prototypes, facts, freezing, and what goes on."""

from __future__ import annotations

import pytest
import torch
from helpers.training import learner_of

from steerlora.config import InterventionConfig
from steerlora.data.chat import EncodedChat
from steerlora.methods.base import Task
from steerlora.methods.routed_lora import arrivals, learning
from steerlora.methods.routed_lora.config import HealthConfig, MemoryConfig
from steerlora.methods.routed_lora.learning import RoutedLoRALearner
from steerlora.methods.routed_lora.memory import MemoryPolicy
from steerlora.methods.routed_lora.signals import prompt_signals
from steerlora.methods.routed_lora.train_under import TrainUnder
from steerlora.methods.routed_lora.watch import RoutingWatch

E, R = 4, 3
DOMAINS = ("law", "math", "code")


def rows(seed: int, count: int = 6) -> list[EncodedChat]:
    """Texts of unequal lengths; each domain has words of its own."""
    generator = torch.Generator().manual_seed(seed)
    words = range(1 + 15 * seed, 16 + 15 * seed)
    made = []
    for index in range(count):
        drawn = torch.randint(words.start, words.stop, (3 + index % 4,), generator=generator)
        made.append(EncodedChat(drawn.tolist(), 2))
    return made


TEXT = {name: rows(number) for number, name in enumerate(DOMAINS)}
JOINT = Task(TEXT)


def in_sequence(position: int) -> Task:
    name = DOMAINS[position]
    return Task({name: TEXT[name]}, position)


@pytest.fixture
def make(make_model, make_adapter):
    """``make(intervention=..., general_text=..., **config)``: a learner."""

    def made(intervention=None, general_text=lambda most: [], **config) -> RoutedLoRALearner:
        model = make_model()
        adapter = make_adapter(model, **config)
        under = intervention or InterventionConfig()
        return learner_of(
            model, adapter, domains=DOMAINS, intervention=under, general_text=general_text
        )

    return made


# What accompanies a task


def test_routing_is_watched_on_the_first_rows_of_every_domain(make, monkeypatch):
    monkeypatch.setattr(learning, "PROBE_ROWS", 2)
    learner = make(health=HealthConfig(log_every=7, collapse="stop"))
    (watch,) = learner.callbacks(JOINT)
    assert isinstance(watch, RoutingWatch)
    assert watch.probe.domains.tolist() == [0, 0, 1, 1, 2, 2]
    first = watch.probe.input_ids[2]
    assert first[first > 0].tolist() == TEXT["math"][0].input_ids
    assert watch.config == HealthConfig(log_every=7, collapse="stop")
    (watch,) = learner.callbacks(in_sequence(1))
    assert watch.probe.domains.tolist() == [1, 1]
    # One domain at a time may well have one specialist.
    assert watch.config == HealthConfig(log_every=7, collapse="ignore")
    watch.history.append({"step": 7})
    assert learner.history() == {"routing": [{"step": 7}], "events": []}


@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_an_intervention_is_held_open_only_where_it_is_trained_under(make, phase):
    under = InterventionConfig(name="shuffle", phase=phase)
    found = [type(one) for one in make(intervention=under).callbacks(JOINT)]
    assert found == [RoutingWatch, TrainUnder][: 2 if phase == "training" else 1]


def test_the_memory_policy_goes_on_from_domain_to_domain_and_not_in_joint_training(make):
    learner = make(memory=MemoryConfig(enabled=True, every=3))
    assert learner.state() == {"frozen": [], "memory": []}
    policy = learner.callbacks(in_sequence(0))[-1]
    assert isinstance(policy, MemoryPolicy)
    assert (policy.domain, policy.policy.every, policy.events) == ("law", 3, [])
    policy.events.append({"event": "spawn"})
    state = learner.state()
    (of_policy,) = state["memory"]
    assert of_policy["events"] == learner.history()["events"] == [{"event": "spawn"}]

    other = make(memory=MemoryConfig(enabled=True))
    other.load_state({"frozen": [2], "memory": state["memory"]})
    assert other.history()["events"] == [{"event": "spawn"}]
    after = other.callbacks(in_sequence(1))[-1]
    assert (after.domain, after.events) == ("math", [{"event": "spawn"}])
    assert after.protected == {2}
    assert other.state()["frozen"] == [2]
    alone = other.callbacks(JOINT)[-1]
    assert (alone.domain, alone.events) == ("all", [])


def test_every_module_may_have_a_memory_of_its_own(make):
    config = MemoryConfig(enabled=True, per_module=True, warmup=9)
    learner = make(memory=config, per_module=True)
    policies = learner.callbacks(in_sequence(2))[1:]
    assert [policy.module for policy in policies] == list(learner.method.layers)
    assert {policy.position for policy in policies} == {2}
    assert len({policy.state_key for policy in policies}) == len(policies)
    policies[1].events.append({"event": "spawn"})
    other = make(memory=config, per_module=True)
    other.load_state(learner.state())
    after = other.callbacks(in_sequence(0))[1:]
    assert [len(policy.events) for policy in after[:3]] == [0, 1, 0]
    assert other.history()["events"] == [{"event": "spawn"}]


# Before the first step


def known(learner: RoutedLoRALearner) -> list[int]:
    return learner.method.routers["1"].known.nonzero().flatten().tolist()


def test_without_general_text_there_is_no_prototype_of_it(make):
    learner = make(router="prototype", null_specialist=True)
    learner.begin(JOINT)
    assert known(learner) == [0, 1, 2]


@pytest.mark.parametrize("null", [True, False])
def test_joint_training_begins_with_all_prototypes(make, null):
    asked = []

    def general(most: int) -> list[EncodedChat]:
        asked.append(most)
        return rows(3)

    learner = make(router="prototype", null_specialist=null, general_text=general)
    learner.begin(JOINT)
    assert known(learner) == [0, 1, 2, *([E] if null else [])]
    assert asked == [learning.PROTOTYPE_ROWS] * null
    texts = [*TEXT.values(), *([rows(3)] if null else [])]
    for row, text in zip(known(learner), texts, strict=True):
        signals = prompt_signals(learner.model, learner.method, text, 0)[1]
        found = learner.method.routers["1"].prototypes[row]
        torch.testing.assert_close(found, signals.mean(0))


def test_in_a_sequence_each_domain_brings_its_own(make):
    asked = []
    learner = make(router="prototype", general_text=lambda most: asked.append(most) or rows(3))
    learner.begin(in_sequence(0))
    assert known(learner) == [0, E]
    before = learner.method.routers["1"].prototypes.clone()
    learner.begin(in_sequence(2))
    assert known(learner) == [0, 2, E]
    assert torch.equal(learner.method.routers["1"].prototypes[[0, E]], before[[0, E]])
    assert len(asked) == 1


def test_prototypes_are_of_rows_spread_over_the_text(make, monkeypatch):
    monkeypatch.setattr(arrivals, "PROTOTYPE_ROWS", 4)
    learner = make(router="prototype", null_specialist=False)
    text = rows(0, count=13)
    learner.begin(Task({"law": text}, 0))
    signals = prompt_signals(learner.model, learner.method, text[::3][:4], 0)[1]
    torch.testing.assert_close(learner.method.routers["1"].prototypes[0], signals.mean(0))


@pytest.mark.parametrize("signal", ["none", "sae"])
def test_learnt_routers_begin_with_nothing(make, signal):
    learner = make(signal=signal, general_text=lambda most: pytest.fail("read for nothing"))
    before = {name: value.clone() for name, value in learner.method.state_dict().items()}
    learner.begin(JOINT)
    after = learner.method.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# After the last step


@torch.no_grad()
def usage_of(learner: RoutedLoRALearner, name: str) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{site: (mean gate [E], ranks [T])}, a text at a time."""
    gates, ranks = {}, {}
    for row in TEXT[name]:
        learner.model(torch.tensor([row.input_ids]))
        for layer, routing in learner.method.routing().items():
            gates.setdefault(layer, []).append(routing.gate[0])
            ranks.setdefault(layer, []).append(routing.mask[0].sum(-1))
    return {layer: (torch.cat(gates[layer]).mean(0), torch.cat(ranks[layer])) for layer in gates}


@pytest.mark.parametrize("fixed", [None, "fixed_rank", "oracle_domain"])
def test_joint_training_ends_with_what_interventions_need(make, fixed):
    """What the adapter was trained under stays as it was."""
    under = InterventionConfig(name=fixed or "none", phase="training")
    learner = make(intervention=under, sites=(1, 2))
    for site in learner.method.sites.values():
        site.facts.mean_rank, site.facts.specialist_of_domain = 1.0, {"law": 3}
    learner.end(JOINT)
    by_domain = {name: usage_of(learner, name) for name in DOMAINS}
    for layer, site in learner.method.sites.items():
        owners = {name: int(found[layer][0].argmax()) for name, found in by_domain.items()}
        ranks = torch.cat([found[layer][1] for found in by_domain.values()])
        expected = 1.0 if fixed == "fixed_rank" else pytest.approx(ranks.mean().item(), rel=1e-5)
        assert site.facts.mean_rank == expected
        assert site.facts.specialist_of_domain == (
            {"law": 3} if fixed == "oracle_domain" else owners
        )


@pytest.mark.parametrize("signal", ["none", "dense"])
def test_without_features_there_is_nothing_to_record(make, signal):
    learner = make(signal=signal)
    learner.end(JOINT)
    assert learner.method.facts() == {}


def test_what_a_domain_used_most_is_frozen_while_one_stays_free(make):
    learner = make(isolation="frozen", sites=(1, 2))
    frozen = []
    for position, name in enumerate([*DOMAINS, DOMAINS[0]]):
        task = Task({name: TEXT[name]}, position)
        assert trained(learner, task) == [e for e in range(E) if e not in frozen]
        learner.end(task)
        if position < E - 1:
            usage = sum(gate for gate, _ in usage_of(learner, name).values())
            free = [e for e in range(E) if e not in frozen]
            frozen.append(max(free, key=lambda e, usage=usage: float(usage[e])))
        assert learner.frozen == frozen
    assert len(frozen) == E - 1
    other = make(isolation="frozen", sites=(1, 2))
    other.load_state(learner.state())
    assert trained(other, in_sequence(1)) == trained(learner, in_sequence(1))


def trained(learner: RoutedLoRALearner, task: Task) -> list[int]:
    """The specialists that a gradient reaches while the task trains."""
    learner.method.zero_grad()
    with learner.training(task):
        sum(layer.A.sum() for layer in learner.method.layers.values()).backward()
    layer = next(iter(learner.method.layers.values()))
    return layer.A.grad.view(E, R, -1).abs().sum((1, 2)).nonzero().flatten().tolist()


def test_isolation_gives_each_domain_of_a_sequence_a_specialist_of_its_own(make):
    own, free = make(isolation="own"), make()
    for position in range(3):
        assert trained(own, in_sequence(position)) == [position]
        assert trained(free, in_sequence(position)) == [0, 1, 2, 3]
        own.end(in_sequence(position))
    assert own.frozen == []
    assert trained(own, JOINT) == [0, 1, 2, 3]  # all domains together have all of them
