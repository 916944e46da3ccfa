"""Activations that an SAE can explain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steerlora.data.activations import ActivationStore
from steerlora.data.harvest import harvest
from steerlora.lm.signal_tokens import ALL_TOKENS


@pytest.fixture
def store(tmp_path, monkeypatch) -> ActivationStore:
    """2000 tokens of width 16 at site 1 that are sparse sums of 32 directions, plus an offset."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(32, 16, generator=generator), dim=1)
    codes = torch.rand(20, 100, 32, generator=generator)
    codes = codes * (codes >= codes.topk(2, dim=-1).values[..., -1:])
    rows = 3 + codes @ directions
    streams = iter(rows)
    monkeypatch.setattr(
        "steerlora.data.harvest.residual_streams",
        lambda model, ids, mask, sites: dict.fromkeys(sites, next(streams)[None]),
    )
    ones = torch.ones(1, 100, dtype=torch.long)
    model = torch.nn.Linear(1, 1)
    stores = {1: tmp_path / "store"}
    return harvest(model, [(ones, ones)] * 20, stores, signal_tokens=ALL_TOKENS)[1]
