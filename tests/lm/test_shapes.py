"""Shapes of decoders, as their configurations and configured sizes give them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from steerlora.config import ModelConfig
from steerlora.errors import UserError
from steerlora.lm.pretrained import qwen3_config
from steerlora.lm.shapes import DecoderShape, model_shape

SHAPE = DecoderShape(
    layers=28,
    width=1024,
    heads=16,
    kv_heads=8,
    head_width=128,
    ffn_width=3072,
    vocabulary=151936,
    tied=True,
)


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


def test_a_folder_speaks_for_itself(tmp_path):
    qwen3_config(SHAPE).save_pretrained(tmp_path)
    told = ModelConfig(name="x", path=str(tmp_path), width=64)
    assert model_shape(told) == SHAPE
    assert model_shape(dataclasses.replace(told, path="Qwen/elsewhere")).width == 64


@pytest.mark.parametrize("content", [None, "{", json.dumps({"hidden_size": 4}), "[]"])
def test_a_folder_that_is_no_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path=.*config\.json"):
        model_shape(ModelConfig(name="x", path=str(tmp_path)))
