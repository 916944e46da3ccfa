"""Options of an SAE's training reach what trains it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from steerlora.cli import compose
from steerlora.config import TrainerConfig
from steerlora.saes.config import SAES
from steerlora.saes.training import SAEModule
from steerlora.stages import activations, sae_fitting

WIDTH, STEPS = 8, 40


@pytest.fixture
def set_up(monkeypatch) -> Callable[..., SAEModule]:
    """``set_up(architecture, **options)``: what the stage would train."""
    rows = 5 + torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0))
    found: list[SAEModule] = []

    def keep(context, module, *others, **options) -> dict:
        found.append(module)
        return {}

    monkeypatch.setattr(sae_fitting, "train", keep)

    class Batches:
        tokens = len(rows)

        def __init__(self, sites, batch_size, seed):
            beside = [rows] if len(sites) == 1 else [rows, rows + sites[1]]
            self.streams = rows if len(sites) == 1 else torch.stack(beside, 1)

        def __call__(self, step):
            return self.streams

    class Site(int):
        width = WIDTH

    monkeypatch.setattr(sae_fitting, "ActivationBatches", Batches)
    monkeypatch.setattr(
        activations, "stores_of", lambda context: [Site(site) for site in context.inputs]
    )

    def set_up(architecture: str = "topk", **options) -> SAEModule:
        sae = SAES[architecture](latents=64, steps=STEPS, **options)
        settings = SimpleNamespace(sae=sae, site=1, trainer=TrainerConfig())
        context = SimpleNamespace(config=settings, inputs=sae.streams(1))
        sae_fitting.fit_stored(context, None, None)
        return found[-1]

    return set_up


def test_the_rate_rises_and_falls_over_the_shares_that_are_given(set_up):
    module = set_up(warmup_fraction=0.25, decay_fraction=0.5)
    factors = [module.lr_factor(step) for step in range(STEPS)]
    assert factors[9] < 1 == factors[10] == factors[19]
    assert 1 > factors[20] > factors[39] > 0
    even = set_up(warmup_fraction=0, decay_fraction=0)
    assert [even.lr_factor(step) for step in range(STEPS)] == [1.0] * STEPS


def test_the_bias_starts_at_the_median_or_at_zero(set_up):
    assert (set_up().sae.b_dec - 5).abs().max() < 0.5
    assert not set_up(median_start=False).sae.b_dec.any()


def test_inputs_are_divided_to_a_norm_of_sqrt_d_where_they_keep_their_size(set_up):
    module = set_up()
    assert module.scale == pytest.approx(26**0.5, rel=0.05)  # of rows about 5, with deviation 1
    assert (module.sae.b_dec - 5).abs().max() < 0.5  # back in the activations' units
    assert set_up(normalize="layer_norm_input").scale == module.scale
    assert set_up(normalize="layer_norm").scale == 1.0 == set_up(scale_inputs=False).scale


def test_rows_are_held_at_unit_length_or_not(set_up):
    assert set_up().sae.unit_norm
    assert not set_up(unit_norm=False).sae.unit_norm


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_thresholds_start_where_so_many_latents_are_active(architecture, set_up):
    sae = set_up(architecture, initial_l0=8).sae
    x = 5 + torch.randn(5000, WIDTH, generator=torch.Generator().manual_seed(1))
    active = (sae.encode(x).values > 0).sum(1).float().mean()
    assert active == pytest.approx(8, rel=0.15)


def test_a_transcoder_starts_at_the_median_of_the_stream_that_it_writes(set_up):
    sae = set_up("skip_transcoder", span=2).sae
    assert (sae.b_dec - (5 + 3)).abs().max() < 0.5  # site 1 writes that of layer 3


def test_what_a_transcoder_writes_is_harvested_too():
    given = ("model=micro_s", "method.sites=[0]", "method.monitor=2")
    for more, expected in {
        (): [0, 2],
        ("sae=skip_transcoder",): [0, 1, 2, 3],
        ("sae=skip_transcoder", "sae.span=2", "method.monitor=null"): [0, 2],
    }.items():
        found = activations.requested(compose.load([*given, *more]))
        assert [step.config.site for step in found] == expected
