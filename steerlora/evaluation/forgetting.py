"""What sequential adaptation keeps, loses and transfers, read off one score matrix.

Shapes: T stages (domains learnt, in order). A score matrix R is [T + 1, T]: R[t, i] is the score
on the i-th domain of the sequence after stage t, and row 0 is the base model. Scores are
higher-is-better, in any unit; every metric here has the same unit, and every average is over
domains. In the formulas domains and stages count from 1, as in the papers, so domain i is learnt
in stage i.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from steerlora.errors import UserError


def score_matrix(
    matrix: ArrayLike,
    *,
    sequence: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
) -> np.ndarray:
    """The score matrix with its columns in the order of learning.

    Args:
        matrix: [T + 1, D] scores, row 0 the base model.
        sequence: the T domains in the order they were learnt; None if the columns already are.
        domains: the D domains that the columns stand for; needed with ``sequence``.

    Returns:
        [T + 1, T] float64. Domains that were scored but never learnt are left out.

    Raises:
        UserError: the shape does not fit the sequence, or a domain of it has no column.
    """
    scores = np.asarray(matrix, dtype=np.float64)
    if scores.ndim != 2:
        raise UserError(f"a score matrix has two axes (stage, domain); got shape {scores.shape}")
    if sequence is not None:
        columns = list(domains or ())
        missing = [name for name in sequence if name not in columns]
        if missing:
            raise UserError(
                f"the score matrix has no column for {', '.join(missing)}; it has {columns}"
            )
        scores = scores[:, [columns.index(name) for name in sequence]]
    stages, learnt = scores.shape[0] - 1, scores.shape[1]
    if stages != learnt or stages < 1:
        raise UserError(
            f"a sequence of {learnt} domains needs {learnt + 1} rows (the base model, then one a "
            f"stage); got {stages + 1}"
        )
    return scores


def positive_forgetting(scores: np.ndarray) -> float:
    """``1/(T-1) sum_{i<T} max(0, max_{0<=t<T} R[t, i] - R[T, i])``: the paper's measure.

    The best score ever held, base model included, less the final one; gains count as zero. The
    last domain is left out: it has had no time to be forgotten. 0 where T is 1.

    Source: the paper (OpenReview 8ovluzEutL); Chaudhry et al. 2018 with the base row and a clamp.
    """
    return _mean(np.maximum(0.0, scores[:-1].max(axis=0) - scores[-1])[:-1])


def chaudhry_forgetting(scores: np.ndarray) -> float:
    """``F_T = 1/(T-1) sum_{j<T} ( max_{1<=l<T} R[l, j] - R[T, j] )``; negative means a late gain.

    The maximum runs over adapted models only, so the base row is not part of it. 0 where T is 1.

    Source: Chaudhry et al. 2018, Riemannian Walk for Incremental Learning, eq. 3.
    """
    if len(scores) < 3:
        return 0.0
    return _mean((scores[1:-1].max(axis=0) - scores[-1])[:-1])


def backward_transfer(scores: np.ndarray) -> float:
    """``BWT = 1/(T-1) sum_{i<T} (R[T, i] - R[i, i])``; negative is forgetting. 0 where T is 1.

    Source: Lopez-Paz & Ranzato 2017, Gradient Episodic Memory, eq. 3.
    """
    return _mean((scores[-1] - np.diagonal(scores[1:]))[:-1])


def forward_transfer(scores: np.ndarray) -> float:
    """``FWT = 1/(T-1) sum_{i>=2} (R[i-1, i] - R[0, i])``: what a domain gains before its stage.

    Row 0 stands for the paper's randomly initialised model: what is measured is what earlier
    domains add to the base model. 0 where T is 1.

    Source: Lopez-Paz & Ranzato 2017, eq. 4.
    """
    return _mean((np.diagonal(scores) - scores[0])[1:])


def final_average(scores: np.ndarray) -> float:
    """``ACC = 1/T sum_i R[T, i]``, all domains, after the last stage.

    Source: Lopez-Paz & Ranzato 2017, eq. 2.
    """
    return _mean(scores[-1])


def just_trained(scores: np.ndarray) -> float:
    """``LA = 1/T sum_i R[i, i]``: learning accuracy, each domain scored as its own stage ends.

    Source: Riemer et al. 2019, Learning to Learn without Forgetting (arXiv 1810.11910), section 5.
    """
    return _mean(np.diagonal(scores[1:]))


def positive_forgetting_stderr(scores: np.ndarray, stderr: np.ndarray) -> float:
    """Standard error of `positive_forgetting` that comes from the evaluation items alone.

    First order: the stage that held the best score is taken as given, domains that were not
    forgotten add nothing, and the best and the final score count as independent. They were
    measured on the same items and mostly agree, so this is an upper bound in practice.

    Args:
        scores: [T + 1, T], as for `positive_forgetting`.
        stderr: [T + 1, T], the standard error of every score.
    """
    if scores.shape[1] < 2:
        return 0.0
    columns = np.arange(scores.shape[1])
    best = scores[:-1].argmax(axis=0)
    forgotten = scores[best, columns] > scores[-1]
    variance = np.where(forgotten, stderr[best, columns] ** 2 + stderr[-1] ** 2, 0.0)[:-1]
    return float(np.sqrt(variance.sum()) / variance.size)


def forgetting_metrics(
    matrix: ArrayLike,
    *,
    sequence: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
) -> dict[str, float]:
    """Every metric of this file for one order.

    Args:
        matrix, sequence, domains: as for `score_matrix`.

    Returns:
        ``positive_forgetting``, ``chaudhry_forgetting``, ``backward_transfer``,
        ``forward_transfer`` and ``final_average``, in the unit of the scores.
    """
    scores = score_matrix(matrix, sequence=sequence, domains=domains)
    return {metric.__name__: metric(scores) for metric in METRICS}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


METRICS = (
    positive_forgetting,
    chaudhry_forgetting,
    backward_transfer,
    forward_transfer,
    final_average,
)
