"""Signals at the end of prompts: what a router knows a domain by."""

from __future__ import annotations

import pytest
import torch

from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import residual_streams
from steerlora.methods.routed_lora import signals
from steerlora.methods.routed_lora.signals import prompt_signals

ROWS = [
    EncodedChat([5, 6, 7, 8, 9], 3),
    EncodedChat([10, 11, 12, 13, 14, 15, 16], 6),
    EncodedChat([20, 21], 1),
]


@pytest.mark.parametrize("signal", ["sae", "dense"])
@pytest.mark.parametrize("context", ["token", "causal_mean", "ema"])
@pytest.mark.parametrize("batch", [64, 2])
def test_the_signal_averaged_over_each_prompt(
    signal, context, batch, make_model, make_adapter, monkeypatch
):
    monkeypatch.setattr(signals, "BATCH_SIZE", batch)
    model = make_model()
    adapter = make_adapter(model, signal, router="prototype", context=context, decay=0.5)
    found = prompt_signals(model, adapter, ROWS, 0)[1]
    base, expected = make_model(), []
    for row in sorted(ROWS, key=lambda row: row.response_start):
        ids = torch.tensor([row.input_ids[: row.response_start]])
        stream = residual_streams(base, ids, torch.ones_like(ids), [1])[1]
        if signal == "sae":
            features = adapter.saes[1].encode(stream)
            dense = torch.zeros(*ids.shape, adapter.saes[1].latents)
            dense.scatter_(-1, features.indices, features.values / 2.5)
        else:
            dense = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)
        length = ids.shape[1]
        ages = torch.arange(length - 1, -1, -1.0)
        weights = {"token": (ages == 0).float(), "causal_mean": torch.ones(length)}
        weights = weights.get(context, 0.5**ages)
        expected.append((weights[:, None] * dense[0]).sum(0) / weights.sum())
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
