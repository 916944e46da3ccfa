"""Packed rows through the model and the adapter: as if each conversation stood alone."""

from __future__ import annotations

import pytest
import torch
from helpers.tolerances import assert_close_in_float32
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from steerlora.data.chat import EncodedChat
from steerlora.data.packing import collate_packed
from steerlora.lm.decoder import check_packing, hidden_states
from steerlora.methods.routed_lora.config import CONTEXTS
from tests.conftest import VOCABULARY

LENGTHS = ((7, 4, 5), (9, 3), (16,))
"""Of the conversations of each row; 16 fill a row, so that there is padding in one alone."""
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ADAPTERS = {
    "token": {},
    "causal_mean": {"context": "causal_mean"},
    "ema": {"context": "ema", "decay": 0.8},
    "mlp": {"router": "mlp", "router_hidden": 6, "context": "causal_mean"},
    "a router a module": {"per_module": True, "context": "ema"},
    "dense": {"signal": "dense", "context": "causal_mean"},
    "last": {"signal": "dense", "source": "base_last"},
    "base": {"source": "base", "sites": (0, 2), "context": "causal_mean"},
    "none": {"signal": "none"},
    "prototype": {"router": "prototype", "context": "causal_mean", "whitened": True},
    "prototype of tokens": {"router": "prototype", "context": "token", "whitened": False},
}


@pytest.fixture
def build(make_model):
    """``build(family, attention)``: a tiny random model in float64, its layers sliding by turns."""

    def make(family: str, attention: str):
        torch.manual_seed(0)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval()
        elif family == "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=4)).double().eval()
        else:
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            window = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
            model = make_model(torch.float64, **window)
        model.set_attn_implementation(attention)
        return model

    return make


@pytest.fixture
def rows() -> list[list[EncodedChat]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            EncodedChat(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist(), n // 2)
            for n in lengths
        ]
        for lengths in LENGTHS
    ]


def together(model, rows) -> list[torch.Tensor]:
    """Final states [n, D] of every conversation, of one forward of packed rows."""
    batch = collate_packed(rows, [0] * len(rows), 0, 16)
    states = hidden_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
    real = states[batch.attention_mask.bool()]
    return list(real.split([len(chat.input_ids) for chats in rows for chat in chats]))


def alone(model, rows) -> list[torch.Tensor]:
    """The same, of a forward a conversation."""
    ids = [torch.tensor([chat.input_ids]) for chats in rows for chat in chats]
    return [hidden_states(model, one, torch.ones_like(one))[0] for one in ids]


def close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close_in_float32(one, other)


@pytest.fixture
def adapted(make_model, make_adapter):
    """``adapted(name, attention)``: a model with one of ``ADAPTERS``, in float64."""

    def make(name: str, attention: str = "sdpa"):
        model = make_model(torch.float64)
        model.set_attn_implementation(attention)
        adapter = make_adapter(model, **ADAPTERS[name])
        if "prototype" in name:
            generator = torch.Generator().manual_seed(2)
            for router in adapter.routers.values():
                width = router.prototypes.shape[1]
                for specialist in (0, 1, 2, None):
                    signals = torch.randn(6, width, generator=generator, dtype=torch.float64)
                    router.fit(specialist, signals)
        return model, adapter

    return make


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen3", "sdpa"),
        ("qwen3", "eager"),
        ("gemma2", "eager"),  # the only one that transformers gives it
    ],
)
def test_each_conversation_is_as_if_alone(family, attention, build, rows):
    model = build(family, attention)
    check_packing(model)
    close(together(model, rows), alone(model, rows))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_with_an_adapter_too(name, attention, rows, adapted):
    model, adapter = adapted(name, attention)
    check_packing(model)
    found = together(model, rows)
    close(found, alone(model, rows))
    with adapter.disabled():  # and the adapter acts
        changed = together(model, rows)
    assert not torch.allclose(found[0], changed[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_conversation_knows_nothing_of_its_neighbours(name, attention, rows, adapted):
    """To the bit: not even by a rounding error."""
    model, _ = adapted(name, attention)
    before = together(model, rows)
    first = rows[0][0]
    other = EncodedChat([id_ % (VOCABULARY - 1) + 1 for id_ in first.input_ids], 3)
    after = together(model, [[other, *rows[0][1:]], *rows[1:]])
    assert not torch.equal(after[0], before[0])
    for one, same in zip(after[1:], before[1:], strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_adapter_knows_the_real_tokens(context, rows, make_model, make_adapter):
    model = make_model()
    adapter = make_adapter(model, context=context)
    together(model, rows)
    stream = torch.zeros(3, 16, 1)
    real = adapter.tokens_with_signal(stream)
    assert real.sum(1).tolist() == [16, 12, 16]
    assert real[1, :12].all()
    restarts = adapter.forward_state.restarts(real)
    assert restarts.nonzero().tolist() == [[0, 7], [0, 11], [1, 9]]


def test_models_that_would_mix_samples_are_refused(make_model, monkeypatch):
    model = make_model()
    check_packing(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(ValueError, match="load it with 'sdpa'"):
            check_packing(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "layer_types", ["full_attention", "linear_attention"])
        with pytest.raises(ValueError, match="linear_attention carry"):
            check_packing(model)
    with monkeypatch.context() as patch:
        patch.delitem(model.model._modules, "rotary_emb")
        with pytest.raises(ValueError, match="no rotary positions"):
            check_packing(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "__module__", __name__)
        with pytest.raises(ValueError, match="masks of its own"):
            check_packing(model)
