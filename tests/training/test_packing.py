"""Training on packed rows is training on the same conversations, a row each."""

from __future__ import annotations

import pytest
import torch
from helpers.features import taxonomy
from helpers.tolerances import assert_close_in_float32
from helpers.training import method_module

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.data.packing import collate_packed
from steerlora.errors import UserError
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.training.language import next_token_loss
from tests.conftest import VOCABULARY

LENGTHS, OWNERS = ((7, 4, 5), (9, 3)), (1, 0)
WEIGHTS = {
    "gate_sparsity": 0.5,
    "rank_budget": 0.25,
    "load_balance": 2.0,
    "preservation": 3.0,
    "steering": 5.0,
}
ADAPTERS = {
    "token": {},
    "causal_mean": {"context": "causal_mean"},
    "ema": {"context": "ema", "decay": 0.8},
    "mlp, a router a module": {"router": "mlp", "router_hidden": 6, "per_module": True},
    "base": {"source": "base", "sites": (0, 2), "context": "causal_mean"},
    "dense": {"signal": "dense", "context": "ema", "dynamic_rank": False},
    "none": {"signal": "none"},
}


@pytest.fixture
def packed() -> ChatBatch:
    return collate_packed(conversations(), OWNERS, 0, 16)


@pytest.fixture
def unpacked() -> ChatBatch:
    rows = [
        (chat, owner) for own, owner in zip(conversations(), OWNERS, strict=True) for chat in own
    ]
    return collate(*zip(*rows, strict=True), 0)


def conversations() -> list[list[EncodedChat]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            EncodedChat(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist(), n // 2)
            for n in lengths
        ]
        for lengths in LENGTHS
    ]


@pytest.fixture
def make_module(make_model, make_adapter, make_sae):
    """``make_module(name, checkpointing)``: all losses on, in float64."""

    def make(name: str, checkpointing: bool = False) -> MethodModule:
        model = make_model(torch.float64)
        adapter = make_adapter(model, **ADAPTERS[name])
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return method_module(
            model,
            adapter,
            trainer=TrainerConfig(packing=True),
            steps=1,
            monitor=Monitor(model, adapter, make_sae(seed=7), 3, taxonomy()),
            **WEIGHTS,
        ).train()

    return make


def learn(made: MethodModule, batch: ChatBatch) -> tuple[dict, dict]:
    """All losses of a batch, and the gradients of their sum."""
    terms = made.learner.losses(batch)
    made.zero_grad()
    sum(weight * value for weight, value in terms.values()).backward()
    gradients = {
        name: p.grad.clone() for name, p in made.method.named_parameters() if p.grad is not None
    }
    return {name: value.detach() for name, (_, value) in terms.items()}, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_losses_and_gradients_are_those_of_a_conversation_a_row(
    name, checkpointing, make_module, packed, unpacked
):
    made = make_module(name, checkpointing)
    found, expected = learn(made, packed), learn(made, unpacked)
    assert len(expected[0]) == (
        3 if name == "none" else 6 if made.method.config.dynamic_rank else 5
    )
    assert (
        expected[1].keys()
        == found[1].keys()
        == {name for name, p in made.method.named_parameters() if p.requires_grad}
    )
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            assert_close_in_float32(one[key], value, key)
    assert all(gradient.abs().sum() > 0 for gradient in found[1].values())


def test_parts_of_a_packed_batch_average_to_the_whole(make_module, packed):
    """What ranks and accumulation make of it."""
    made = make_module("causal_mean")
    whole = next_token_loss(made.model, packed)
    parts = [packed.part(index, 2) for index in range(2)]
    assert [part.position_ids.shape for part in parts] == [(1, 16), (1, 12)]
    mean = sum(next_token_loss(made.model, part) for part in parts) / 2
    assert_close_in_float32(mean, whole)


def test_a_model_that_would_mix_conversations_is_refused_in_one_line(make_model, make_adapter):
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"trainer\.packing=true: .*; set it to false") as caught:
        method_module(model, make_adapter(model), trainer=TrainerConfig(packing=True), steps=1)
    assert "\n" not in str(caught.value)
