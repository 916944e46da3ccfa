"""SAEs trained at once are those that each would be alone."""

import copy

import pytest
import torch

from steerlora.saes.geometry.together import BIASES, TogetherSettings, train_together
from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule

SETTINGS = TogetherSettings(steps=12, batch_size=16)


def study(count: int = 3, width: int = 8, latents: int = 24):
    saes, data = [], []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(60, width, generator=generator) * (1 + seed) + seed
        sae = TopK(width, latents, k=3, auxiliary=0.0, seed=seed)
        sae.center_on(rows)
        saes.append(sae)
        data.append(rows)
    return saes, data, list(range(10, 10 + count))


def alone(sae: TopK, rows: torch.Tensor, seed: int) -> TopK:
    """By the project's own module, losses and sparse kernels, without Lightning."""
    module = SAEModule(
        sae, total_steps=SETTINGS.steps, warmup_steps=int(SETTINGS.warmup_fraction * SETTINGS.steps)
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=module.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(SETTINGS.steps):
        optimizer.param_groups[0]["lr"] = module.lr * module.lr_factor(step)
        batch = rows[torch.randint(len(rows), (SETTINGS.batch_size,), generator=generator)]
        losses, _ = module.losses(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        sae.normalize_decoder()
    return sae


def test_they_are_what_each_would_be_alone():
    saes, data, seeds = study()
    before = copy.deepcopy(saes)
    slow = [alone(*one) for one in zip(copy.deepcopy(saes), data, seeds, strict=True)]
    train_together(saes, data, seeds, SETTINGS)
    for sae, expected, first in zip(saes, slow, before, strict=True):
        for name, value in sae.state_dict().items():
            assert torch.allclose(value, expected.state_dict()[name], atol=2e-4), name
        assert not torch.allclose(sae.W_enc, first.W_enc, atol=1e-2)
        assert sae.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 24, abs=1e-5)


def test_biases_may_train_alone():
    (sae, *_), (rows, *_), _ = study()
    before = copy.deepcopy(sae)
    train_together([sae], [rows], [0], TogetherSettings(steps=5, batch_size=8, trained=BIASES))
    assert torch.allclose(sae.W_enc, before.W_enc)
    assert torch.allclose(sae.W_dec, before.W_dec)
    assert not torch.allclose(sae.b_enc, before.b_enc)
    assert not torch.allclose(sae.b_dec, before.b_dec)


def test_shapes_that_differ_are_refused():
    saes, data, seeds = study(2)
    with pytest.raises(ValueError, match="2 SAEs of 2 shapes"):
        train_together([saes[0], study(1, latents=32)[0][0]], data, seeds, SETTINGS)
    with pytest.raises(ValueError, match="1 data sets"):
        train_together(saes, data[:1], seeds, SETTINGS)
