"""ReLU: the training's dense features are the encoder's, and so is their count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from steerlora.saes.base import squared_deviation
from steerlora.saes.relu import ReLU

WIDTH, LATENTS, TOKENS = 16, 64, 96


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("normalize", "apply_b_dec_to_input"),
    [("none", True), ("none", False), ("layer_norm_input", True)],
)
def test_errors_are_those_of_the_sparse_features(normalize, apply_b_dec_to_input, x):
    sae = ReLU(
        WIDTH,
        LATENTS,
        l1=0.3,
        normalize=normalize,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    with torch.no_grad():
        sae.b_dec += 0.5
    features = sae.encode(x)
    found = sae.training_errors(x, torch.zeros(LATENTS, dtype=torch.bool))
    torch.testing.assert_close(found.error, (x - sae(x)).square().sum())
    torch.testing.assert_close(found.penalty, 0.3 * features.values.sum() / TOKENS)
    assert torch.equal(found.fired, sae.times_fired(features))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_operations_are_torch_s_count(apply_b_dec_to_input, x):
    sae = ReLU(WIDTH, LATENTS, apply_b_dec_to_input=apply_b_dec_to_input)

    def step() -> None:
        errors = sae.training_errors(x, torch.zeros(LATENTS, dtype=torch.bool))
        (errors.error / squared_deviation(x) + errors.penalty).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert sae.training_flops_per_token() == counter.get_total_flops() / TOKENS
