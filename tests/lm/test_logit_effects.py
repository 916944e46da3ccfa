"""A direction's effect on logits is that of the norm's gain and the head's rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from steerlora.lm.logit_effects import logit_effects


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model_with_root_mean_square_norm(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    nn.init.normal_(model.model.norm.weight, 1.0, 0.5)
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    found = logit_effects(model, directions)
    for direction, effects in zip(directions, found, strict=True):
        unit = direction / (direction.square().mean() + 1e-6).sqrt()
        expected = model.lm_head.weight @ (model.model.norm.weight * unit)
        assert torch.allclose(effects, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(logit_effects(model, 100 * directions), found, rtol=1e-4, atol=1e-5)


def test_what_norm_and_head_add_to_every_stream_is_left_out():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2)).eval()
    nn.init.normal_(model.transformer.ln_f.bias)
    direction = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    centred = direction - direction.mean()
    expected = model.lm_head.weight @ (centred / centred.square().mean().sqrt())[0]
    assert torch.allclose(logit_effects(model, direction)[0], expected, rtol=1e-3, atol=1e-4)
