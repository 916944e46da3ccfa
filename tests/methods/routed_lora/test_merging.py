"""Merged specialists against the dense singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from steerlora.methods.routed_lora.merging import merge_low_rank


def factors(ranks, d_in=11, d_out=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    As = [torch.randn(r, d_in, generator=generator, dtype=dtype) for r in ranks]
    Bs = [torch.randn(d_out, r, generator=generator, dtype=dtype) for r in ranks]
    return As, Bs


def summed(As, Bs, weights):
    return sum(w * B @ A for w, A, B in zip(weights, As, Bs, strict=True))


@pytest.mark.parametrize("ranks", [[3, 3], [2, 4, 1], [8, 8]])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_it_is_the_truncated_svd(ranks, rank):
    As, Bs = factors(ranks)
    weights = [0.7, 0.3, 2.0][: len(ranks)]
    A, B = merge_low_rank(As, Bs, weights, rank)
    U, s, Vh = torch.linalg.svd(summed(As, Bs, weights))
    best = U[:, :rank] * s[:rank] @ Vh[:rank]
    assert A.shape == (rank, 11)
    assert B.shape == (9, rank)
    torch.testing.assert_close(B @ A, best, atol=1e-10, rtol=0)


def test_components_fall_and_are_split_evenly():
    As, Bs = factors([4, 4])
    A, B = merge_low_rank(As, Bs, [0.5, 0.5], 4)
    singular = torch.linalg.svdvals(summed(As, Bs, [0.5, 0.5]))[:4]
    torch.testing.assert_close(A.norm(dim=1), singular.sqrt())
    torch.testing.assert_close(B.norm(dim=0), singular.sqrt())
    # The first j components are themselves the best of rank j: what a rank mask keeps.
    shorter_A, shorter_B = merge_low_rank(As, Bs, [0.5, 0.5], 2)
    torch.testing.assert_close(B[:, :2] @ A[:2], shorter_B @ shorter_A)


def test_what_fits_is_kept_whole_and_the_rest_is_zero():
    As, Bs = factors([2, 1])
    A, B = merge_low_rank(As, Bs, [1.0, -0.5], 5)
    torch.testing.assert_close(B @ A, summed(As, Bs, [1.0, -0.5]))
    assert not A[3:].any()
    assert not B[:, 3:].any()
    # The same update twice has no more rank than once.
    A, B = merge_low_rank([As[0]] * 2, [Bs[0]] * 2, [0.25, 0.75], 4)
    torch.testing.assert_close(B @ A, Bs[0] @ As[0])
    assert not A[2:].any()
    # Two that were never trained.
    A, B = merge_low_rank(As, [torch.zeros_like(B) for B in Bs], [1.0, 1.0], 3)
    assert not A.any()
    assert not B.any()


def test_float32_factors_are_merged_in_float64():
    As, Bs = factors([3, 3], dtype=torch.float32)
    A, B = merge_low_rank(As, Bs, [0.5, 0.5], 6)
    assert A.dtype == B.dtype == torch.float32
    exact = summed([A.double() for A in As], [B.double() for B in Bs], [0.5, 0.5])
    assert (B.double() @ A.double() - exact).norm() < 1e-6 * exact.norm()
    # Of rank three in all: what float32 leaves over is no component.
    A, B = merge_low_rank([As[0]] * 2, [Bs[0], Bs[0] * (1 + 1e-7)], [0.5, 0.5], 6)
    assert not A[3:].any()
