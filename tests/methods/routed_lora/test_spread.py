"""An adapter on a model whose layers lie on several devices, as accelerate spreads them.

There need be no such devices here: under torch's fake tensors every operation checks that its
operands share a device, and "cpu:1" counts as another one than "cpu". Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from steerlora.lm.decoder import continued, residual_streams, spliced_logits

FIRST, SECOND = "cpu", "cpu:1"
PLACES = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": SECOND,
    "model.layers.2": SECOND,
    "model.norm": SECOND,
    "lm_head": FIRST,
}


class Arrive(ModelHook):
    """What accelerate puts on each module of a spread model: inputs come to the module's device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def pre_forward(self, module, *args, **kwargs):
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)


def replace_parameters(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` by new parameters: fake ones cannot be swapped in place."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = nn.Parameter(function(parameter.data), parameter.requires_grad)
            module._parameters[name] = moved
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


@pytest.fixture
def spread(make_model, monkeypatch) -> Iterator[nn.Module]:
    monkeypatch.setattr(nn.Module, "_apply", replace_parameters)
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        model = make_model(tie_word_embeddings=False)
        for name, device in PLACES.items():
            add_hook_to_module(model.get_submodule(name).to(device), Arrive(device))
        yield model


@pytest.fixture
def text(spread) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.ones(2, 5, dtype=torch.long)
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize(
    "shape",
    [
        {"sites": (1, 2)},
        {"sites": (1, 2), "source": "base", "context": "causal_mean"},
        {"sites": (2,), "router": "mlp", "per_module": True},
        {"sites": (1, 2), "signal": "dense", "source": "base_last"},
        {"sites": (0,), "signal": "none", "dynamic_rank": False},
    ],
    ids=str,
)
def test_each_layer_s_matrices_and_signals_are_where_it_is(spread, text, make_adapter, shape):
    ids, mask = text
    adapter = make_adapter(spread, **shape)
    for name, layer in adapter.layers.items():
        assert str(layer.A.device) == PLACES[f"model.layers.{name.split(':')[0]}"]
    positions = torch.arange(5).expand_as(ids)
    logits = spread(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert str(logits.device) == FIRST
    for routing in adapter.routing().values():
        assert str(routing.gate.device) == FIRST
    adapter.remove()
    spread(ids, attention_mask=mask, use_cache=False)


def test_streams_come_to_the_ids_and_edits_go_to_the_stream(spread, text, make_sae):
    ids, mask = text
    streams = residual_streams(spread, ids, mask, [1, 2, 3])
    assert {str(stream.device) for stream in streams.values()} == {FIRST}
    assert str(continued(spread, streams[2], 2, 3, attention_mask=mask).device) == SECOND
    seen = []
    spliced_logits(spread, ids, mask, 2, lambda stream: seen.append(stream.device) or stream)
    assert str(seen[0]) == SECOND
