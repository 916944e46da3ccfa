"""What a dictionary makes of activations at k active entries a token, beside what PCA does.

Shapes: T tokens, D width, N directions, K active ones of a token, S SAEs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.saes.sparse import SparseFeatures

SWEEPS = 20
"""Rounds of coordinate descent after every direction that is added to a token's."""


def unexplained(x: Tensor, y: Tensor) -> float:
    """Fraction of variance unexplained, sum |x - y|^2 / sum |x - E x|^2, of x and y [T, D]."""
    return float((x - y).square().sum() / (x - x.mean(0)).square().sum())


def pca_unexplained(fitted: Tensor, x: Tensor, k: int) -> float:
    """The fraction that the first k principal components of other rows leave unexplained.

    Args:
        fitted: rows that mean and components are of, [T', D].
        x: [T, D].
        k: from 1 to D.
    """
    mean = fitted.mean(0)
    basis = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:k]
    return unexplained(x, mean + (x - mean) @ basis.t() @ basis)


def non_negative_pursuit(x: Tensor, dictionary: Tensor, k: int) -> SparseFeatures:
    """Each token as a non-negative sum of at most k directions: a dictionary's own limit.

    Non-negative orthogonal matching pursuit: the direction that the residual goes along most is
    added, and all coefficients of the token are fitted again by non-negative least squares (by
    coordinate descent; Bruckstein et al. 2008, section III).

    Args:
        x: [T, D], less whatever bias is granted.
        dictionary: [N, D], of any length.
        k: from 1 to N.

    Returns:
        values and indices [T, K]; of the directions at unit length.
    """
    rows = F.normalize(dictionary, dim=1)
    gram, along = rows @ rows.t(), x @ rows.t()  # [N, N], [T, N]
    tokens = torch.arange(len(x))
    chosen = torch.zeros(len(x), 0, dtype=torch.long)
    values = x.new_zeros(len(x), 0)
    free = torch.ones_like(along, dtype=torch.bool)
    for _ in range(k):
        left = along - (values[:, None] @ gram[chosen]).squeeze(1) if len(chosen[0]) else along
        new = left.where(free, -torch.inf).argmax(1)
        free[tokens, new] = False
        chosen = torch.cat([chosen, new[:, None]], 1)
        values = torch.cat([values, left.gather(1, new[:, None]).clamp_min(0)], 1)
        values = _least_squares(values, gram[chosen[:, :, None], chosen[:, None]], along, chosen)
    return SparseFeatures(values, chosen)


def _least_squares(values: Tensor, gram: Tensor, along: Tensor, chosen: Tensor) -> Tensor:
    """Non-negative least squares on chosen directions [T, J] from a start, by coordinate descent.

    Args:
        values: the start, [T, J].
        gram: of the chosen directions, which have unit length, [T, J, J].
        along: products of every direction with the token, [T, N].
    """
    target = along.gather(1, chosen)
    values = values.clone()
    for _ in range(SWEEPS):
        for place in range(values.shape[1]):
            others = (gram[:, place] * values).sum(1) - values[:, place]
            values[:, place] = (target[:, place] - others).clamp_min(0)
    return values


def pursuit_unexplained(x: Tensor, dictionary: Tensor, bias: Tensor, k: int) -> float:
    """The fraction that non-negative pursuit leaves unexplained of x [T, D], with a bias [D]."""
    values, indices = non_negative_pursuit(x - bias, dictionary, k)
    rows = F.normalize(dictionary, dim=1)
    return unexplained(x, bias + (values[:, None] @ rows[indices]).squeeze(1))
