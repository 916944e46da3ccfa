"""Rules of thumb for a model of which nobody has said what suits it."""

from __future__ import annotations

import pytest

from steerlora.cli import compose, sections
from steerlora.lm import suited


@pytest.mark.parametrize(
    ("layers", "ratios", "site"),
    [
        (30, [], 11),
        (30, [1.0] * 12 + [171.0] * 18, 11),
        (30, [1.0] * 9 + [20.0] * 21, 8),
        (30, [1.0] * 9 + [20.0] * 4 + [9.9] * 17, 13),  # as near above as 9 would be below
        (30, [1.0] * 10 + [20.0] * 2 + [9.9] * 18, 12),
        (30, [1.0] * 11 + [20.0] + [1.0] * 18, 10),  # the lower of two
        (4, [50.0] * 4, 1),  # no layer is free
        (4, [1.0, 50.0, 50.0, 50.0], 1),  # the embedding is no site
        (2, [1.0, 1.0], 1),
        (1, [1.0], 0),
    ],
)
def test_the_site_is_the_free_layer_nearest_to_three_eighths(layers, ratios, site):
    assert suited.control_site(layers, ratios) == site


def test_what_follows_from_the_width_is_what_the_shipped_models_have():
    for name in sections.groups()["model"]:
        if name != "own":
            model = compose.load([f"model={name}"]).model
            if model.path is not None and model.sae_path is None:
                assert model.sae_latents == suited.latents(model.width)
    assert [suited.active_latents(width) for width in (8, 128, 576, 1024, 2048, 5120)] == [
        *(8, 16, 32, 32, 64, 64),
    ]
    rates = [suited.adapter_learning_rate(width) for width in (128, 576, 2000, 4096)]
    assert rates == [4.3e-3, 1.3e-3, 5e-4, 2.9e-4]


@pytest.mark.parametrize(
    ("lengths", "limit", "length"),
    [
        ([[10] * 95 + [900] * 5], None, 64),
        ([[10] * 94 + [900] * 6], None, 960),
        ([[10] * 100, [65] * 100], None, 128),
        ([[64] * 100], None, 64),
        ([[5000] * 10], None, 1024),
        ([[5000] * 10], 512, 512),
    ],
)
def test_the_context_holds_most_rows_of_every_domain(lengths, limit, length):
    assert suited.context_length(lengths, limit) == length


def test_a_quantile_is_one_of_the_values():
    assert suited.quantile([3, 1, 2], 0.5) == 2
    assert suited.quantile([7], 0.95) == 7
