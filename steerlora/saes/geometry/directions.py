"""How two dictionaries or sets of activations lie to each other, and what chance gives.

Shapes: T tokens, D width, N and M directions of two dictionaries, K dimensions of a subspace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096
"""Directions that are compared at once."""


def alignment(directions: Tensor, dictionary: Tensor) -> Tensor:
    """Largest cosine of each direction with any of a dictionary, s_i = max_j cos(d_i, g_j), [N].

    It grows with the dictionary and falls with D, so it says nothing without the same of random
    directions. Source: arXiv 2605.28896, equation 9.

    Args:
        directions: [N, D].
        dictionary: [M, D].
    """
    rows = F.normalize(dictionary, dim=1).t()
    parts = F.normalize(directions, dim=1).split(BLOCK)
    return torch.cat([(part @ rows).amax(1) for part in parts])


def subspace(rows: Tensor, k: int) -> Tensor:
    """Orthonormal basis [K, D] of the directions in which rows [N, D] are longest: the first right
    singular vectors.

    Raises:
        ValueError: the rows have fewer dimensions.
    """
    if not 1 <= k <= min(rows.shape):
        raise ValueError(f"a subspace of {k} dimensions of rows of shape {tuple(rows.shape)}")
    return torch.linalg.svd(rows, full_matrices=False).Vh[:k]


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles of two subspaces in degrees, the smallest first, [K].

    cos theta_i is the i-th singular value of Q_1 Q_2^T (Björck & Golub 1973).

    Args:
        first, second: orthonormal bases, [K, D].
    """
    cosines = torch.linalg.svdvals(first @ second.t()).clamp(0, 1)
    return torch.rad2deg(torch.arccos(cosines))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Centred linear CKA of two sets of activations of the same tokens, from 0 to 1.

    |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F), of X and Y less their means (Kornblith et al., arXiv
    1905.00414). Columns that never vary, such as dead latents, do not count. NaN where nothing
    varies.

    Args:
        first: X, [T, N].
        second: Y, [T, M].
    """
    x, y = (part.double() - part.double().mean(0) for part in (first, second))
    norms = (x.t() @ x).norm() * (y.t() @ y).norm()
    return float((y.t() @ x).square().sum() / norms)


def effective_rank(gram: Tensor) -> float:
    """exp(H(p)) of the singular values of rows X, p their shares of the sum (Roy & Vetterli 2007).

    1 where all rows lie on a line; NaN where they are all zero.

    Args:
        gram: X^T X, [D, D].
    """
    sigma = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp())


# What chance gives


def random_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors of no preferred direction, [N, D]."""
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def matched_directions(count: int, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Unit vectors drawn from N(0, Cov) of rows [T, D], which know nothing else of them, [N, D]."""
    centred = rows - rows.mean(0)
    weights = torch.randn(count, len(rows), generator=generator)
    return F.normalize(weights @ centred, dim=1)


def permuted_components(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows [T, D] with each of their principal components permuted over the tokens on its own.

    Mean and covariance stay, and nothing that several components say together.
    """
    mean = rows.mean(0)
    basis = torch.linalg.svd(rows - mean, full_matrices=False).Vh
    scores = (rows - mean) @ basis.t()
    order = torch.rand(scores.shape, generator=generator).argsort(0)
    return scores.gather(0, order) @ basis + mean
