"""A push is the decoded difference of two codes: beside codes that are written out in full."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerlora.saes.pushes import push
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.topk import TopK

LATENTS = torch.tensor([3, 11])


def full_code(sae: TopK, x: Tensor) -> Tensor:
    """Every latent of every token, [T, N], in the SAE's units."""
    return sae.encode(x).dense(sae.latents)


def decoded(sae: TopK, x: Tensor, code: Tensor) -> Tensor:
    """The reconstruction that a code stands for, in the units of the stream."""
    inputs = sae.normalized(x)
    every = torch.arange(sae.latents).expand_as(code)
    return sae.decode(SparseFeatures(code, every)) * inputs.scale + inputs.mean


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("how", ["set", "add"])
def test_it_is_the_difference_of_two_reconstructions(how, normalize):
    sae = TopK(8, 16, k=6, normalize=normalize, seed=1).double()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
    strengths = torch.tensor([2.5, -0.2], dtype=torch.float64)
    before = full_code(sae, x)
    assert before[:, 11].any()
    assert not before[:, 11].all()
    after = before.clone()
    for latent, strength in zip(LATENTS, strengths, strict=True):
        after[:, latent] = strength if how == "set" else (before[:, latent] + strength).clamp_min(0)
    expected = decoded(sae, x, after) - decoded(sae, x, before)
    torch.testing.assert_close(push(sae, x, LATENTS, strengths, how), expected)


def test_the_strength_may_differ_from_token_to_token(make_sae):
    sae = make_sae()
    x = torch.randn(4, sae.width, generator=torch.Generator().manual_seed(0))
    strengths = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    together = push(sae, x, LATENTS, strengths)
    alone = [push(sae, x[i], LATENTS, strengths[i]) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("how", ["set", "add"])
def test_strengths_have_an_exact_gradient(how):
    sae = TopK(8, 16, k=6, seed=1).double().requires_grad_(False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    strengths = torch.tensor([2.5, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: push(sae, x, LATENTS, s, how), (strengths,))
