"""Decoder-only families of transformers: what is found in them, and that an adapter fits exactly.

Tiny random models of each; a family is here for what sets it apart from Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from steerlora.lm.decoder import (
    continued,
    decoder_of,
    edited,
    final_norm,
    layers_of,
    layers_path,
    residual_streams,
)
from steerlora.lm.targets import find_targets
from steerlora.methods.lowrank import AdaptedLinear
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import RoutedLoRAConfig

WIDTH, LAYERS = 32, 3
SIZES = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
QUERIES = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 4}
"""Shorter than the texts below, so that it matters."""
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What is said of a family: config, name of its layers, last names of the linear ones."""

    config: dict
    path: str = "model.layers"
    linear: tuple[str, ...] = GATED


FAMILIES = {
    "qwen3": Family(SIZES | QUERIES),
    "qwen2": Family(SIZES | {"num_key_value_heads": 2}),
    "llama": Family(SIZES | QUERIES),
    "mistral": Family(SIZES | QUERIES | WINDOW),
    "gemma2": Family(SIZES | QUERIES | WINDOW),  # scaled embeddings, two kinds of layers
    "gemma3_text": Family(SIZES | QUERIES | WINDOW),
    "phi3": Family(
        SIZES | {"num_key_value_heads": 2, "sliding_window": None},
        linear=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "phi": Family(SIZES, linear=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "gpt_neox": Family(
        SIZES,
        "gpt_neox.layers",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": Family(
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
        "model.decoder.layers",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    "gpt2": Family(SIZES | GPT, "transformer.h", ("c_attn", "c_proj", "c_fc", "c_proj")),
    "falcon": Family(
        SIZES,
        "transformer.h",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bloom": Family(
        {**SIZES, "n_layer": LAYERS, "n_head": 4},
        "transformer.h",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "mpt": Family(
        {"vocab_size": 61, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64},
        "transformer.blocks",
        ("Wqkv", "out_proj", "up_proj", "down_proj"),
    ),
    # Experts are one tensor each, which nothing adapts.
    "mixtral": Family(SIZES | QUERIES | {"num_local_experts": 2}, linear=GATED[:4]),
    "cohere": Family(SIZES | QUERIES),  # scaled logits
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def model(request, family):
    name = next(name for name, known in FAMILIES.items() if known is family)
    config = AutoConfig.for_model(name, **family.config, initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def test_layers_and_linear_modules_are_found(family, model):
    assert layers_path(model) == family.path
    assert len(layers_of(model)) == LAYERS
    targets = find_targets(model, 1, None)
    layers = {name.split(":")[0] for name in targets}
    assert layers == {"1", "2"}
    last = [name.rsplit("/", 1)[-1].rsplit(":", 1)[-1] for name in targets]
    assert sorted(last) == sorted(2 * family.linear)


def test_streams_are_the_model_s_hidden_states(model, tokens):
    ids, mask = tokens([9, 6])
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
    streams = residual_streams(model, ids, mask, range(LAYERS))
    for site in range(LAYERS):
        assert torch.equal(streams[site], output.hidden_states[site])
    last = residual_streams(model, ids, mask, [LAYERS])[LAYERS]
    assert torch.equal(final_norm(model)(last), output.hidden_states[LAYERS])
    # From the middle on, however the family makes its first stream of embeddings.
    rest = continued(model, streams[1], 1, LAYERS, attention_mask=mask)
    assert torch.equal(rest, last)
    seen = {}

    def record(stream):
        seen["last"] = stream
        return stream

    with edited(model, {LAYERS: record}), torch.no_grad():
        model(ids, attention_mask=mask)
    assert torch.equal(seen["last"], last)


def test_one_pass_cached_decoding_and_removal_are_exact(model, make_adapter, tokens):
    ids, mask = tokens([9, 6])
    with torch.no_grad():
        before = model(ids, attention_mask=mask, output_hidden_states=True)
    parts = [*model.modules()]
    adapter = make_adapter(model, sites=(1, 2), context="causal_mean")
    with torch.no_grad():
        adapted = model(ids, attention_mask=mask, output_hidden_states=True)
    # Below the first site everything is the base's, so its features are those of the base.
    for site in (0, 1):
        assert torch.equal(adapted.hidden_states[site], before.hidden_states[site])
    assert not torch.allclose(adapted.logits, before.logits)
    _decodes_as_in_one_forward(model, ids[:1], adapted.logits[:1])
    with adapter.disabled(), torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, before.logits)
    adapter.remove()
    assert all(now is then for now, then in zip(model.modules(), parts, strict=True))
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, before.logits)


@torch.no_grad()
def _decodes_as_in_one_forward(model, ids, expected) -> None:
    mask = torch.ones_like(ids)
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    cache, logits = first.past_key_values, [first.logits]
    for end in range(5, ids.shape[1] + 1):
        step = model(
            ids[:, end - 1 : end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"cache_implementation": "static"}, {"num_beams": 3}], ids=str
)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt2", "falcon"], indirect=True)
def test_generation_with_a_cache_is_that_of_each_alone_without(
    settings, model, make_adapter, tokens
):
    """Windows that tokens leave, positions that are learnt: whatever a family's cache is."""
    model = model.double()
    make_adapter(model, context="causal_mean")
    ids, mask = (part.flip(1) for part in tokens([7, 5]))  # padding on the left
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **chosen, **settings)[:, -6:]
    chosen |= {"use_cache": False, "num_beams": settings.get("num_beams", 1)}
    for row, real, new in zip(ids, mask.bool(), found, strict=True):
        assert torch.equal(model.generate(row[real][None], **chosen)[0, -6:], new)


def test_the_frozen_base_s_own_streams_are_read_where_asked_for(model, make_adapter, tokens):
    ids, mask = tokens([9, 6])
    base = residual_streams(model, ids, mask, [2])[2]
    adapter = make_adapter(model, sites=(1, 2), source="base")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(adapter.forward_state.base_streams[2], base)
    assert not torch.allclose(output.hidden_states[2], base)


def test_a_name_of_another_family_is_refused_with_what_there_is(make_adapter):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SIZES, **GPT))
    with pytest.raises(ValueError, match=r"named q_proj; .* attn\.c_attn \(Conv1D\), .*mlp\.c_fc"):
        make_adapter(model, target_modules=("q_proj",))
    adapter = make_adapter(model, target_modules=("c_attn",))
    assert sum(isinstance(module, AdaptedLinear) for module in model.modules()) == 2
    adapter.remove()


def test_models_without_attention_or_decoder_are_refused(make_sae):
    mamba = AutoConfig.for_model("mamba", vocab_size=61, hidden_size=WIDTH, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(mamba)
    with pytest.raises(ValueError, match=r"MambaModel keeps no keys and values .*cache_params"):
        Adapter(model, RoutedLoRAConfig(sites=[1]), {1: make_sae()})
    bert = BertConfig(**SIZES)
    with pytest.raises(ValueError, match=r"BertLMHeadModel has no decoder: .* bert \(BertModel\)"):
        decoder_of(AutoModelForCausalLM.from_config(bert))
