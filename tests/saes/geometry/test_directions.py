"""Angles, alignments and CKA against slow references, and against what must come out."""

import math

import pytest
import torch
from scipy.linalg import subspace_angles

from steerlora.saes.geometry.directions import (
    alignment,
    effective_rank,
    linear_cka,
    matched_directions,
    permuted_components,
    principal_angles,
    random_directions,
    subspace,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_is_the_largest_cosine():
    directions, dictionary = drawn(5, 7), drawn(9, 7, seed=1)
    slow = [
        max(float(torch.dot(d, g) / (d.norm() * g.norm())) for g in dictionary) for d in directions
    ]
    assert alignment(directions, dictionary).tolist() == pytest.approx(slow)
    assert alignment(3 * dictionary, dictionary).tolist() == pytest.approx([1] * 9)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_principal_angles_are_scipys(k):
    first, second = subspace(drawn(20, 8), k), subspace(drawn(15, 8, seed=1), k)
    slow = sorted(math.degrees(angle) for angle in subspace_angles(first.T, second.T))
    assert principal_angles(first, second).tolist() == pytest.approx(slow, abs=1e-5)
    assert principal_angles(first, first).tolist() == pytest.approx([0] * k, abs=1e-5)


def test_a_subspace_is_where_rows_are_longest():
    rows = torch.cat([10 * torch.eye(4)[:2], torch.eye(4)])
    assert float(subspace(rows, 2)[:, 2:].abs().max()) < 1e-6
    with pytest.raises(ValueError, match="5 dimensions of rows of shape"):
        subspace(rows, 5)


def test_linear_cka_is_that_of_centred_gram_matrices():
    x, y = drawn(12, 5), drawn(12, 3, seed=1) + 4
    centre = torch.eye(12, dtype=torch.float64) - 1 / 12
    first, second = (centre @ part @ part.t() @ centre for part in (x, y))
    slow = (first * second).sum() / (first.norm() * second.norm())
    assert linear_cka(x, y) == pytest.approx(float(slow))
    assert linear_cka(x, 3 * x @ torch.linalg.qr(drawn(5, 5)).Q + 2) == pytest.approx(1)
    padded = torch.cat([y, torch.full((12, 4), 5.0)], 1)
    assert linear_cka(x, padded) == pytest.approx(float(slow))  # dead latents do not count
    assert math.isnan(linear_cka(x, torch.ones(12, 2)))


def test_effective_rank_counts_equal_directions():
    for rank in (1, 3):
        rows = drawn(rank, rank) @ torch.linalg.qr(drawn(8, 8)).Q[:rank]
        rows = torch.linalg.qr(rows.t()).Q.t()  # orthonormal: equal singular values
        assert effective_rank(rows.t() @ rows) == pytest.approx(rank, abs=1e-4)


def test_matched_directions_have_the_covariance_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 4, generator=generator) * torch.tensor([4.0, 1, 0.01, 0.01]) + 7
    found = matched_directions(4000, rows, generator)
    assert found.norm(dim=1).tolist() == pytest.approx([1] * 4000, abs=1e-5)
    along = found.square().mean(0)
    assert along[0] > 0.7
    assert along[2] < 0.01
    assert abs(float(found[:, 0].mean())) < 0.05  # the mean is taken out
    assert float(random_directions(4000, 4, generator).square().mean(0).min()) > 0.2


def test_permuted_components_keep_mean_and_covariance_alone():
    generator = torch.Generator().manual_seed(0)
    sign = torch.randn(2000, 1, generator=generator).sign()
    scale = 1 + torch.rand(2000, 1, generator=generator)
    # Two directions, of which a token has one: uncorrelated, and not independent.
    which = (torch.rand(2000, 1, generator=generator) > 0.5).float()
    rows = torch.cat([which, 1 - which, torch.zeros(2000, 1)], 1) * sign * scale * 3 + 5
    found = permuted_components(rows, generator)
    assert torch.allclose(found.mean(0), rows.mean(0), atol=1e-3)
    assert torch.allclose(found.t().cov(), rows.t().cov(), atol=0.25)
    both = ((found - 5)[:, :2].abs() > 1).all(1).float().mean()
    assert both > 0.1
    assert not ((rows - 5)[:, :2].abs() > 1).all(1).any()
