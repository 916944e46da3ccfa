"""Frozen specialists are unchanged to the bit; the others train as they would without."""

from __future__ import annotations

import pytest
import torch
from helpers.training import method_module, train

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.methods.module import MethodModule
from steerlora.methods.routed_lora.isolation import train_only
from steerlora.training.language import next_token_loss

E, R, STEPS = 4, 3, 8


def batch(step: int) -> ChatBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedChat(torch.randint(1, 60, (7,), generator=generator).tolist(), 2) for _ in range(16)
    ]
    return ChatBatches(rows, [0] * 16, batch_size=4, pad_token_id=0, seed=0)(step)


@pytest.fixture
def make_module(make_model, make_adapter):
    def make() -> MethodModule:
        model = make_model()
        trainer = TrainerConfig(batch_size=4, learning_rate=1e-2)
        # The diversity loss reaches every specialist, whether a token is routed to it or not.
        return method_module(
            model, make_adapter(model), trainer=trainer, steps=STEPS, diversity=0.5
        )

    return make


def specialists(adapter, what=lambda parameter: parameter) -> list[list[torch.Tensor]]:
    """Per specialist, its parts of every A and B."""
    parts = [[] for _ in range(E)]
    for layer in adapter.layers.values():
        for e in range(E):
            rows = slice(e * R, (e + 1) * R)
            parts[e] += [what(layer.A)[rows].clone(), what(layer.B)[:, rows].clone()]
    return parts


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("trained", [[2], [0, 3], [0, 1, 2, 3]])
def test_training_leaves_the_others_bit_for_bit(make_module, tmp_path, trained):
    made = make_module()
    before = specialists(made.method)
    with train_only(made.method, trained):
        train(made, batch, tmp_path, STEPS)
    after = specialists(made.method)
    for e in range(E):
        unchanged = [torch.equal(a, b) for a, b in zip(before[e], after[e], strict=True)]
        assert not any(unchanged) if e in trained else all(unchanged), e


def test_without_it_every_specialist_moves(make_module, tmp_path):
    made = make_module()
    before = specialists(made.method)
    train(made, batch, tmp_path, STEPS)
    after = specialists(made.method)
    assert not any(all_equal(before[e], after[e]) for e in range(E))


def test_gradients_are_zero_before_anything_reads_them(make_module):
    made = make_module()
    adapter, parameters = made.method, list(made.method.layers.parameters())

    def gradients(context=None) -> list[list[torch.Tensor]]:
        adapter.zero_grad()
        next_token_loss(made.model, batch(0)).backward()
        return specialists(adapter, lambda parameter: parameter.grad)

    free = gradients()
    with train_only(adapter, [1]):
        held = gradients()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
    assert all_equal(held[1], free[1])
    assert not any(part.any() for e in (0, 2, 3) for part in held[e])
    expected = torch.stack([part.square().sum() for part in free[1]]).sum().sqrt()
    torch.testing.assert_close(norm, expected)
    # The context over, all of them train again, and routers did all along.
    assert all(all_equal(a, b) for a, b in zip(gradients(), free, strict=True))
    with train_only(adapter, [1]):
        gradients()
        assert adapter.routers["1"].weight.grad.any()


def test_it_ends_where_the_training_fails(make_module):
    made = make_module()
    with pytest.raises(KeyError, match="mine"), train_only(made.method, [0]):
        raise KeyError("mine")
    next_token_loss(made.model, batch(0)).backward()
    gradients = specialists(made.method, lambda parameter: parameter.grad)
    assert any(part.any() for part in gradients[3])


def test_a_gradient_that_is_not_finite_is_held_as_well(make_module):
    adapter = make_module().method
    with train_only(adapter, [1]):
        layer = next(iter(adapter.layers.values()))
        (layer.A * torch.inf).sum().backward()
    assert not layer.A.grad[:R].any()
    assert layer.A.grad[R : 2 * R].isinf().all()


@pytest.mark.parametrize("trained", [[], [4], [-1, 0]])
def test_unknown_specialists_are_refused(make_module, trained):
    with pytest.raises(ValueError, match="choose from 0 to 3"):
        train_only(make_module().method, trained).__enter__()
