"""A tiny model with units whose D is random, as after training: D = 0 would test nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from steerlora.methods.base import Sources
from steerlora.methods.stan.adapter import Stan
from steerlora.methods.stan.config import StanConfig


@pytest.fixture
def make_stan() -> Callable[..., Stan]:
    """``make_stan(model, **config)``: 12 units, 4 of which act, attached to all layers from 1."""

    def make(model: nn.Module, sources: Sources | None = None, *, seed: int = 0, **changes) -> Stan:
        config = StanConfig(**({"units": 12, "k": 4, "name": "stan"} | changes))
        method = config.build(model, sources or Sources(), seed=seed)
        generator = torch.Generator().manual_seed(1)
        for layer in method.layers.values():
            layer.decoder.data.normal_(0, 0.3, generator=generator)
        return method.to(next(model.parameters()).dtype)

    return make
