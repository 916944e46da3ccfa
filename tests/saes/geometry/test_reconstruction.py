"""What dictionaries leave unexplained, against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import PCA

from steerlora.saes.geometry.directions import random_directions
from steerlora.saes.geometry.reconstruction import (
    non_negative_pursuit,
    pca_unexplained,
    pursuit_unexplained,
    unexplained,
)


def test_pca_leaves_what_scikit_learns_leaves():
    generator = torch.Generator().manual_seed(0)
    fitted, x = (torch.randn(40, 6, generator=generator) + 3 for _ in range(2))
    pca = PCA(2).fit(fitted.numpy())
    slow = pca.inverse_transform(pca.transform(x.numpy()))
    expected = unexplained(x, torch.tensor(slow))
    assert pca_unexplained(fitted, x, 2) == pytest.approx(expected, rel=1e-4)
    assert pca_unexplained(x, x, 6) == pytest.approx(0, abs=1e-6)


def test_pursuit_is_greedy_non_negative_least_squares():
    generator = torch.Generator().manual_seed(0)
    rows = random_directions(12, 6, generator)
    x = torch.randn(8, 6, generator=generator)
    values, indices = non_negative_pursuit(x, 5 * rows, 3)
    for token, value, chosen in zip(x.numpy(), values, indices, strict=True):
        slow, residual, coefficients = [], token, np.zeros(0)
        for _ in range(3):
            along = rows.numpy() @ residual
            along[slow] = -np.inf
            slow.append(int(along.argmax()))
            coefficients, _ = nnls(rows[slow].numpy().T, token)
            residual = token - coefficients @ rows[slow].numpy()
        assert chosen.tolist() == slow
        assert value.tolist() == pytest.approx(coefficients.tolist(), abs=2e-3)
    assert float(values.min()) >= 0


def test_a_dictionary_explains_what_it_made():
    generator = torch.Generator().manual_seed(0)
    rows, bias = random_directions(8, 32, generator), torch.full((32,), 2.0)
    weights = torch.rand(50, 8, generator=generator) * (
        torch.rand(50, 8, generator=generator) < 0.3
    )
    x = bias + weights @ rows
    assert pursuit_unexplained(x, rows, bias, 8) < 1e-3
    assert pursuit_unexplained(x, random_directions(8, 32, generator), bias, 8) > 0.3
