"""The whole state of a sharded training: under all names of its weights, and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from steerlora.distributed import shards


@pytest.fixture
def shared(monkeypatch) -> nn.Module:
    """A model and its adapter, one module in both; the shards are doubles of the weights."""
    module = nn.Module()
    module.model, module.adapter = nn.Sequential(nn.Linear(2, 2)), nn.Module()
    module.model[0].requires_grad_(False)
    added = nn.Linear(2, 1)
    added.register_buffer("scale", torch.ones(1))
    module.model.append(added)
    module.adapter.layer = added
    shards = {p: p.detach().clone() for p in added.parameters()}
    monkeypatch.setattr(shards, "_whole", lambda p, *_: shards[p].clone())
    monkeypatch.setattr(shards, "_put", lambda p, _, value, __: shards[p].copy_(value))
    monkeypatch.setattr(shards, "_flats", lambda _: [torch.empty(0)])
    module.shards = shards
    return module


def test_a_weight_with_two_names_is_kept_and_restored_under_either(shared):
    zero = SimpleNamespace()
    state = shards.whole_state(shared, zero)
    assert state.keys() == shared.state_dict().keys()
    kept = {name: value + 1 for name, value in state.items() if name.startswith("adapter.")}
    assert kept.keys() == {f"adapter.layer.{name}" for name in ("weight", "bias", "scale")}
    shards.restore_state(shared, zero, kept)
    for name, parameter in shared.adapter.layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), kept[f"adapter.layer.{name}"])
        torch.testing.assert_close(shared.shards[parameter], kept[f"adapter.layer.{name}"])
    assert shared.model[1].scale == 2
