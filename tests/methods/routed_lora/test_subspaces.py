"""InfLoRA: inputs of layers, free directions, the memory, and what trains."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training import learner_of

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.methods.base import Task
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import SubspaceLoRAConfig
from steerlora.methods.routed_lora.subspaces import free_directions, input_moments, remember

D, R, E = 12, 3, 3


def moment(seed: int, width: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, width, dtype=torch.float64, generator=generator)
    x = x * torch.logspace(0, -2, width, dtype=torch.float64)
    return x.t() @ x / 50


def rows(seed: int, count: int = 7) -> list[EncodedChat]:
    generator = torch.Generator().manual_seed(seed)
    first = 1 + 20 * seed
    return [
        EncodedChat(
            torch.randint(first, first + 20, (3 + index % 4,), generator=generator).tolist(), 2
        )
        for index in range(count)
    ]


TEXT = {"law": rows(0), "math": rows(1)}


def in_sequence(position: int) -> Task:
    name = list(TEXT)[position]
    return Task({name: TEXT[name]}, position)


@pytest.fixture
def learner(make_model):
    model = make_model()
    config = SubspaceLoRAConfig(
        signal="none", isolation="own", dynamic_rank=False, specialists=E, rank=R, kept_first=0.9
    )
    return learner_of(model, Adapter(model, config, seed=2).attach(model), domains=list(TEXT))


def test_moments_are_of_the_inputs_of_real_tokens(learner):
    found = input_moments(learner.model, learner.method, TEXT["law"], 0)
    assert found.keys() == learner.method.layers.keys()
    name = next(name for name in found if name.endswith("q_proj"))
    layer = learner.model.model.layers[int(name.split(":")[0])]
    seen = []
    hook = layer.input_layernorm.register_forward_hook(lambda *parts: seen.append(parts[-1][0]))
    with torch.no_grad():
        for row in TEXT["law"]:  # one by one: there is no padding
            learner.model(torch.tensor([row.input_ids]))
    hook.remove()
    x = torch.cat(seen).double()
    torch.testing.assert_close(found[name], x.t() @ x / len(x), atol=1e-6, rtol=1e-5)


def test_free_directions_are_the_strongest_outside_the_memory():
    own = moment(0)
    directions = torch.linalg.eigh(own).eigenvectors
    first = free_directions(own, own[:, :0], R)
    torch.testing.assert_close(first @ first.t(), torch.eye(R, dtype=torch.float64) / 3)
    overlap = first @ directions.flip(1)[:, :R] * math.sqrt(3)
    torch.testing.assert_close(overlap.abs(), torch.eye(R, dtype=torch.float64))
    memory = remember(moment(1), own[:, :0], 0.9)
    after = free_directions(own, memory, R)
    assert float((after @ memory).abs().max()) < 1e-12
    assert float(torch.einsum("rd,de,re->", after, own, after)) > 0


@pytest.mark.parametrize("share", [0.5, 0.95, 0.999])
def test_the_memory_holds_the_share_with_as_few_directions_as_can_be(share):
    first = remember(moment(0), moment(0)[:, :0], 0.8)
    for memory, own in ((first[:, :0], moment(0)), (first, moment(1))):
        after = remember(own, memory, share)
        columns = after.shape[1]
        torch.testing.assert_close(
            after.t() @ after, torch.eye(columns, dtype=torch.float64), atol=1e-9, rtol=0
        )
        held = [
            float((after[:, :kept].t() @ own @ after[:, :kept]).trace() / own.trace())
            for kept in (columns, columns - 1)
        ]
        assert held[0] >= share - 1e-12
        assert columns == memory.shape[1] or held[1] < share
    assert torch.equal(remember(moment(0), first, 0.7), first)  # it holds that already


def test_everything_is_remembered_at_most_once():
    assert remember(moment(0), moment(0)[:, :0], 1.0).shape[1] <= D
    full = torch.eye(D, dtype=torch.float64)
    assert torch.equal(remember(moment(0), full, 1.0), full)


def gradients(learner, task: Task) -> dict[str, set[int]]:
    """{matrix: the specialists of which it has a gradient}."""
    learner.method.zero_grad()
    batch = collate(TEXT["law"] + TEXT["math"], [0] * 7 + [1] * 7, 0)
    with learner.training(task):
        learner.losses(batch)["task"][1].backward()
    found = {"A": set(), "B": set()}
    for layer in learner.method.layers.values():
        for e in range(E):
            own = slice(e * R, (e + 1) * R)
            found["A"] |= {e} if layer.A.grad[own].any() else set()
            found["B"] |= {e} if layer.B.grad[:, own].any() else set()
    return found


def test_of_the_arriving_domain_only_the_second_matrix_trains(learner):
    learner.begin(in_sequence(0))
    assert gradients(learner, in_sequence(0)) == {"A": set(), "B": {0}}
    learner.end(in_sequence(0))
    learner.begin(in_sequence(1))
    assert gradients(learner, in_sequence(1)) == {"A": set(), "B": {1}}
    for name, layer in learner.method.layers.items():
        memory = learner.directions[name].to(layer.A.dtype)
        assert memory.shape[1] > 0
        assert float((layer.A[R : 2 * R].detach() @ memory).abs().max()) < 1e-5


def test_trained_together_domains_have_plain_low_rank_updates(learner):
    before = {name: layer.A.clone() for name, layer in learner.method.layers.items()}
    learner.begin(Task(TEXT))
    assert all(torch.equal(before[n], layer.A) for n, layer in learner.method.layers.items())
    with torch.no_grad():
        for layer in learner.method.layers.values():
            layer.B.normal_(0, 0.1)
    assert gradients(learner, Task(TEXT)) == {"A": {0, 1, 2}, "B": {0, 1, 2}}


def test_the_share_rises_and_the_memory_goes_on(learner, make_model):
    learner.begin(in_sequence(0))
    learner.end(in_sequence(0))
    model = make_model()
    other = learner_of(
        model, Adapter(model, learner.config, seed=2).attach(model), domains=list(TEXT)
    )
    other.load_state(learner.state())
    assert other.directions.keys() == learner.directions.keys()
    counts = {name: memory.shape[1] for name, memory in other.directions.items()}
    other.end(in_sequence(1))
    assert all(other.directions[name].shape[1] >= count for name, count in counts.items())
    moments = input_moments(other.model, other.method, TEXT["math"], 0)
    for name, own in moments.items():
        memory = other.directions[name]
        assert float((memory.t() @ own @ memory).trace() / own.trace()) >= 0.95 - 1e-9
