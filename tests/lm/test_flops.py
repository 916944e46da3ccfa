"""Arithmetic beside torch's own count of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.data.batches import ChatBatch
from steerlora.lm import flops
from steerlora.lm.shapes import DecoderShape
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.saes.topk import TopK
from steerlora.training.language import next_token_loss

ROWS, LENGTH, LATENTS = 2, 48, 512


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    """Its attention is plain matrix products, which the counter knows on every device."""
    config = Qwen3Config(
        vocab_size=700,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config).train()


@pytest.fixture
def batch() -> ChatBatch:
    ids = torch.randint(1, 700, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH // 2 + 1] = -100
    return ChatBatch(ids, torch.ones_like(ids), labels, torch.zeros(ROWS), ids.numel())


def counted(run) -> float:
    """FLOPs a token."""

    def accumulated(out, left, right, *args, out_shape=None, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: accumulated})
    with counter:
        run()
    return counter.get_total_flops() / (ROWS * LENGTH)


@pytest.mark.parametrize("site", [0, 2, 4])
def test_a_step_of_adapter_training(site, model, batch):
    sae = TopK(128, LATENTS, k=8)
    adapter = Adapter(model, RoutedLoRAConfig(sites=(site,), rank=2), {site: sae}).attach(model)
    found = counted(lambda: next_token_loss(model, batch).backward())
    said = flops.training_flops_per_token(
        DecoderShape.of(model.config),
        adapter_parameters=sum(p.numel() for p in adapter.layers.parameters()),
        first_adapted_layer=site,
        sequence=LENGTH,
        labelled=(LENGTH // 2 - 1) / LENGTH,
        sae_parameters=128 * LATENTS,
    )
    assert said == pytest.approx(found, rel=0.01)


def test_a_step_of_pretraining(model, batch):
    batch.labels.copy_(batch.input_ids)
    found = counted(lambda: next_token_loss(model, batch).backward())
    said = flops.pretraining_flops_per_token(DecoderShape.of(model.config), LENGTH)
    assert said == pytest.approx(found, rel=0.02)  # the last token of a row has no label


def test_a_harvest(model, batch):
    model.eval().requires_grad_(False)
    model.model.layers = model.model.layers[:3]
    found = counted(lambda: model.model(batch.input_ids))
    shape = DecoderShape.of(model.config)
    assert flops.harvesting_flops_per_token(shape, 3, LENGTH) == pytest.approx(found, rel=0.01)
