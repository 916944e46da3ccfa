"""The fused update against a loop over specialists and rank components."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from steerlora.methods.lowrank import AdaptedLinear, LowRank

E, R, D_IN, D_OUT = 3, 4, 10, 7


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def adapted(source, *, bias: bool = True) -> AdaptedLinear:
    low_rank = LowRank(D_IN, D_OUT, E * R).double()
    low_rank.B.data = random(D_OUT, E * R, seed=5)
    base = nn.Linear(D_IN, D_OUT, bias=bias).double().requires_grad_(False)
    return AdaptedLinear(base, low_rank, source, constant_scale=1.5)


def slow(layer: AdaptedLinear, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    A, B = layer.low_rank.A, layer.low_rank.B
    y = x @ layer.base.weight.t() + (0 if layer.base.bias is None else layer.base.bias)
    for component in range(E * R):
        shade = (x @ A[component]) * scale[..., component]
        y = y + shade[..., None] * B[:, component]
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_update_and_every_gradient_equal_the_loop(bias, routed, contiguous):
    scale = random(2, 5, E * R, seed=2).requires_grad_() if routed else None
    layer = adapted(SimpleNamespace(scale=scale, columns=None, disabled=False), bias=bias)
    x = random(2, 5, D_IN, seed=1) if contiguous else random(5, 2, D_IN, seed=1).transpose(0, 1)
    x.requires_grad_()
    weight = random(2, 5, D_OUT, seed=3)
    constant = torch.full((2, 5, E * R), 1.5, dtype=torch.float64)
    expected = slow(layer, x, scale if routed else constant)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    inputs = [x, layer.low_rank.A, layer.low_rank.B, *([scale] if routed else [])]
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_it_starts_as_the_base_layer():
    layer = adapted(SimpleNamespace(scale=None, columns=None, disabled=False))
    layer.low_rank = LowRank(D_IN, D_OUT, E * R).double()
    x = random(2, 5, D_IN)
    assert torch.equal(layer(x), layer.base(x))


def test_fan_in_of_the_stack_is_the_input_width():
    """Torch's Kaiming on [E, R, D_in] would take the fan-in R * D_in: sqrt(R) too small."""
    A = LowRank(400, 8, 64, torch.Generator().manual_seed(0)).A
    bound = 1 / 400**0.5  # kaiming_uniform_(a=sqrt(5)) of one specialist's [R, D_in] matrix
    one_by_one = torch.empty(16, 400)
    nn.init.kaiming_uniform_(one_by_one, a=5**0.5, generator=torch.Generator().manual_seed(1))
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(one_by_one.std().item(), rel=0.02)


def test_types_of_the_base_are_kept():
    layer = adapted(SimpleNamespace(scale=torch.rand(2, 5, E * R), columns=None, disabled=False))
    layer.base.to(torch.bfloat16)
    layer.low_rank.float()
    out = layer(torch.randn(2, 5, D_IN, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.low_rank.A.grad.dtype == torch.float32
    layer.base.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 5, D_IN)).dtype == torch.bfloat16


def test_it_passes_for_the_layer_it_replaces():
    layer = adapted(SimpleNamespace(scale=None, columns=None, disabled=False))
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    assert layer.weight is layer.base.weight
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_dropout_drops_the_specialists_inputs_and_only_where_a_gradient_is_recorded():
    scale = random(50, E * R, seed=2)
    layer = adapted(SimpleNamespace(scale=scale, columns=None, disabled=False))
    layer.low_rank.A.data = random(E * R, D_IN, seed=6)
    x = random(50, D_IN, seed=1)
    with torch.no_grad():
        intact = layer(x)
    layer.dropout = 0.25
    with torch.no_grad():
        assert layer(x).equal(intact)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.25)
    assert 0.15 < (dropped == 0).double().mean() < 0.35
    update = slow(layer, dropped, scale) - layer.base(dropped)
    torch.testing.assert_close(found, layer.base(x) + update, atol=1e-10, rtol=0)
