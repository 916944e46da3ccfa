"""Several low-rank updates as one of a given rank.

D_in and D_out widths of the adapted layer, R_i rank of update i, R rank of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_low_rank(
    As: Sequence[Tensor], Bs: Sequence[Tensor], weights: Sequence[float], rank: int
) -> tuple[Tensor, Tensor]:
    """The best approximation of sum_i w_i B_i A_i by a product B A of rank R (Frobenius norm).

    With the factors stacked, sum_i w_i B_i A_i = B' A'; from B' = Q_B T_B and A'^T = Q_A T_A (QR),
    the singular values of the [sum R_i, sum R_i] core T_B T_A^T are those of the whole, so nothing
    of size [D_out, D_in] is built (Eckart and Young's theorem does the rest). Components come in
    falling order, since a rank mask keeps the first ones longest, and each singular value s is
    split evenly, sqrt(s) to either factor. Components beyond the numerical rank are exactly zero in
    both factors, where no gradient would ever reach them: a caller who trains on gives their rows
    of A a fresh start.

    Args:
        As: A_i, [R_i, D_in].
        Bs: B_i, [D_out, R_i].
        weights: w_i.
        rank: R.

    Returns:
        A [R, D_in] and B [D_out, R], in the type of the first A. Computed in float64.
    """
    first = As[0]
    A = torch.cat([part.double() for part in As])
    B = torch.cat([w * part.double() for w, part in zip(weights, Bs, strict=True)], 1)
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(A.t())
    U, values, V_transposed = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    significant = values > max(A.shape[0], 1) * torch.finfo(first.dtype).eps * values[0]
    roots = (values * significant).sqrt()[:rank]
    merged_A, merged_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(B.shape[0], rank)
    merged_A[: len(roots)] = roots[:, None] * (V_transposed[:rank] @ right.t())
    merged_B[:, : len(roots)] = (left @ U[:, :rank]) * roots
    return merged_A.to(first), merged_B.to(first)
