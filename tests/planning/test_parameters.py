"""Counts of parameters beside the modules themselves, at the true shapes of Qwen3."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from steerlora.stages.adapting import shape_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    Qwen3ForCausalLM,
)

from steerlora.cli import compose
from steerlora.config import ModelConfig
from steerlora.errors import UserError
from steerlora.lm.pretrained import qwen3_config
from steerlora.lm.shapes import DecoderShape, model_shape
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.planning.parameters import (
    adapter_parameters,
    adapter_sizes,
    base_parameters,
    base_sizes,
    sae_parameters,
)
from steerlora.saes.topk import TopK

QWEN3 = {  # layers, width, heads, MLP, tied; 8 heads of keys of width 128, vocabulary 151936
    "0.6B": (28, 1024, 16, 3072, True),
    "1.7B": (28, 2048, 16, 6144, True),
    "4B": (36, 2560, 32, 9728, True),
    "8B": (36, 4096, 32, 12288, False),
    "14B": (40, 5120, 40, 17408, False),
    "32B": (64, 5120, 64, 25600, False),
}


def qwen3(size: str) -> DecoderShape:
    layers, width, heads, ffn, tied = QWEN3[size]
    return DecoderShape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        head_width=128,
        ffn_width=ffn,
        vocabulary=151936,
        tied=tied,
    )


@pytest.mark.parametrize("size", QWEN3)
def test_a_base_has_as_many_as_transformers_gives_it(size):
    shape = qwen3(size)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3_config(shape))
    found = base_parameters(shape)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert DecoderShape.of(model.config) == shape
    sizes = base_sizes(shape)
    assert sum(size * count for size, count in sizes.items()) == found.total
    assert sum(sizes.values()) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "method=lora",
        "method=moe_lora",
        "method=sc_lora method.router=mlp method.router_hidden=8",
        "method=sc_lora method.dynamic_rank=false method.sites=[0,2]",
        "method=sc_lora_reference method.router_hidden=8",
        "method=sc_lora_context",
        "method.target_modules=[q_proj,mlp.down_proj]",
        "method.target_modules=[self_attn.*]",
    ],
)
def test_an_adapter_has_as_many_as_it_says(changes):
    config = compose.load(["model=micro_m", *changes.split()])
    shape, latents = model_shape(config.model), config.sae.latents
    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3_config(shape))
    saes = {site: TopK(shape.width, latents, k=config.sae.k) for site in config.method.sites}
    adapter = Adapter(model, shape_of(config.adapter, config.control), saes)
    found = adapter_parameters(shape, config.adapter, config.control, latents)
    assert found.total == adapter.parameter_count()
    assert found.low_rank == sum(p.numel() for p in adapter.layers.parameters())
    assert found.outputs == sum(layer.B.numel() for layer in adapter.layers.values())
    sizes = adapter_sizes(shape, config.adapter, config.control, latents)
    assert sum(size * count for size, count in sizes.items()) == found.total


def test_an_sae_has_as_many_as_its_tensors():
    sae = TopK(24, 96, k=4)
    assert sae_parameters(24, 96) == sum(p.numel() for p in sae.parameters())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=99),
        Gemma2Config(hidden_size=64, num_attention_heads=4, head_dim=32, num_key_value_heads=2),
    ],
    ids=["llama", "gemma2"],
)
def test_the_shape_of_other_families_is_read_from_their_configuration(config):
    shape = DecoderShape.of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    linears = {
        name.rsplit(".", 1)[-1]: (module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert shape.linears == linears
    # Gemma's layer has two norms more.
    whole = sum(p.numel() for p in model.parameters())
    assert base_parameters(shape).total == pytest.approx(whole, rel=0.001)


def test_a_folder_speaks_for_itself(tmp_path):
    shape = qwen3("0.6B")
    qwen3_config(shape).save_pretrained(tmp_path)
    told = ModelConfig(name="x", path=str(tmp_path), width=64)
    assert model_shape(told) == shape
    assert model_shape(dataclasses.replace(told, path="Qwen/elsewhere")).width == 64


@pytest.mark.parametrize("content", [None, "{", json.dumps({"hidden_size": 4}), "[]"])
def test_a_folder_that_is_no_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path=.*config\.json"):
        model_shape(ModelConfig(name="x", path=str(tmp_path)))
