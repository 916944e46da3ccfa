"""Exact top-k and products with k-sparse matrices, forward and backward over active latents only.

Shapes: T tokens, D model width, N latents, K active latents per token.

S below is the [T, N] matrix that holds ``values[t, k]`` at column ``indices[t, k]``. It is not
built: ``S @ table`` is an embedding-bag over the active rows of a contiguous [N, D] table, and
``S.T @ rows`` is the same thing after grouping the active entries by latent.

Where many latents are active, as under an L1 penalty, gathering rows costs more than multiplying by
all of them. Features are then *dense*, K = N, and S and its matrix products take the place of bags.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from steerlora.distributed.reductions import largest_over_ranks

# Pre-activations held at once: fits a CPU's cache (top-k then costs next to nothing beside the
# matrix product); large enough on an accelerator to keep it busy.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 2**21, 2**27
# But never fewer tokens, as long as there are: on a CPU the product of 1024 numbers a token with
# 32768 latents took 11 % longer, and product and top-k 20 %, in blocks of 128.
_LEAST_BLOCK_TOKENS = 512

DENSE_FROM, PROBED = 1 / 4, 128
"""Features without a k are dense where one of the first so many tokens has more than this share of
all latents: on a CPU, bags and matrix products take alike from about there on."""


class SparseFeatures(NamedTuple):
    """Active latents of every token.

    Attributes:
        values: [..., K] activations, >= 0; 0 where fewer than K latents are active.
        indices: [..., K] int64 latent numbers in [0, N); meaningless where ``values`` is 0.
    """

    values: Tensor
    indices: Tensor

    def dense(self, latents: int) -> Tensor:
        """The same features with a column for every latent, [..., N]."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], latents)
        return zeros.scatter_add(-1, self.indices, self.values)

    def among(self, kept: Tensor) -> SparseFeatures:
        """Those entries [..., K] alone that ``kept`` says, in as few columns as they fill."""
        values = torch.where(kept, self.values, 0)
        width = max(1, int(kept.sum(-1).max())) if kept.numel() else 1
        position = kept.to(values.dtype).topk(width, dim=-1, sorted=False).indices
        return SparseFeatures(values.gather(-1, position), self.indices.gather(-1, position))


def is_dense(features: SparseFeatures, latents: int) -> bool:
    """Whether every token has as many entries as there are latents."""
    return features.indices.shape[-1] >= latents


def top_k(scores: Tensor, k: int) -> SparseFeatures:
    """The k largest of each row, exactly, in no particular order.

    Rows are cut into groups of G. Any of the k largest entries lies in one of the k groups with the
    largest maxima (were its group not among them, k entries would be larger), so two small
    selections, over N / G maxima and over k G candidates, replace one over N. G = sqrt(N / k)
    balances them. Of equal entries, any may be chosen; the choice is deterministic.

    Args:
        scores: [T, N].
        k: how many, at most N.

    Returns:
        values and indices, both [T, k].
    """
    count = scores.shape[1]
    group = 2 ** round(math.log2(max(1.0, count / k)) / 2)
    if group < 4 or count % group:
        return SparseFeatures(*scores.topk(k, dim=1, sorted=False))
    groups = count // group
    blocks = scores.view(-1, group, groups)  # group j holds the columns j, j + groups, ...
    best = blocks.amax(dim=1).topk(k, dim=1, sorted=False).indices  # [T, k]
    candidates = blocks.gather(2, best[:, None, :].expand(-1, group, -1)).flatten(1)  # [T, G k]
    values, position = candidates.topk(k, dim=1, sorted=False)
    return SparseFeatures(values, (position // k) * groups + best.gather(1, position % k))


def sparse_times_table(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """``S @ table``: [T, K], [T, K], contiguous [N, D] -> [T, D]."""
    features = SparseFeatures(values, indices)
    if is_dense(features, len(table)):
        return features.dense(len(table)) @ table
    return F.embedding_bag(indices, table, per_sample_weights=values, mode="sum")


def sparse_transposed_times(values: Tensor, indices: Tensor, rows: Tensor, latents: int) -> Tensor:
    """``S.T @ rows``: [T, K], [T, K], [T, D] -> [N, D], grouping the entries by latent."""
    features = SparseFeatures(values, indices)
    if is_dense(features, latents):
        return features.dense(latents).t() @ rows
    by_latent, order = indices.flatten().to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(by_latent, torch.arange(latents, device=rows.device).int())
    token = order // indices.shape[1]
    weights = values.flatten()[order]
    return F.embedding_bag(token, rows, starts, per_sample_weights=weights, mode="sum")


def rows_dot_table(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``rows[t] . table[indices[t, k]]`` without a [T, K, D] gather: -> [T, K].

    It is the gradient that torch's own embedding-bag gives its per-sample weights.
    """
    if indices.shape[1] >= len(table):
        return (rows @ table.t()).gather(1, indices)
    tokens, active = indices.shape
    bag = torch.arange(tokens, device=rows.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(),
        table,
        indices.flatten(),
        bag * active,
        bag.repeat_interleave(active),
        0,  # mode: sum
    ).view(tokens, active)


def _busiest(scores: Tensor, floor: float | Tensor) -> int:
    """Entries above the floor in the row that has most of them; 1 at least."""
    return max(1, int((scores > floor).sum(1).max())) if len(scores) else 1


class _Encode(torch.autograd.Function):
    """ReLU of the selected entries of ``(x - shift) W + b``, a block of tokens at a time."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, shift, k, budget, extra_latents, extra_k):
        table = W_enc.t().contiguous()  # no copy in the layout that SparseAutoencoder keeps
        block = _CPU_BLOCK if x.device.type == "cpu" else _ACCELERATOR_BLOCK
        block_tokens = max(_LEAST_BLOCK_TOKENS, block // table.shape[0])
        # One buffer for all blocks: fresh memory for each costs as much as the selection.
        buffer = x.new_empty(min(block_tokens, len(x)), table.shape[0])
        parts, extras = [], []
        largest, floor = x.new_empty(0), 0.0
        for tokens in x.split(block_tokens):
            scores = torch.addmm(b_enc, tokens - shift, table.t(), out=buffer[: len(tokens)])
            if budget:
                # What is not among the largest of the blocks so far is not among those of all.
                largest = torch.cat([largest, scores[scores > floor]])
                if len(largest) > budget:
                    largest = largest.topk(budget, sorted=False).values
                    floor = torch.nextafter(largest.min(), largest.new_zeros(()))
            # Without a k every latent above the floor is kept, up to the block's busiest token.
            width = k or _busiest(scores, floor)
            parts.append(top_k(scores, width))
            if extra_latents is not None:
                extra = scores[:, extra_latents].topk(extra_k, dim=1, sorted=False)
                extras.append(SparseFeatures(extra.values, extra_latents[extra.indices]))
        if budget:
            largest = largest_over_ranks(largest, budget)
            if len(largest) == budget:
                floor = torch.nextafter(largest.min(), largest.new_zeros(()))
            parts = [part.among(part.values > floor) for part in parts]
        width = max((part.values.shape[1] for part in parts), default=k or 1)
        values = torch.cat([F.pad(p.values, (0, width - p.values.shape[1])) for p in parts])
        indices = torch.cat([F.pad(p.indices, (0, width - p.indices.shape[1])) for p in parts])
        if extras:
            values = torch.cat([values, torch.cat([extra.values for extra in extras])], 1)
            indices = torch.cat([indices, torch.cat([extra.indices for extra in extras])], 1)
        values = values.relu_()
        ctx.save_for_backward(x, W_enc, shift, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, _):
        x, W_enc, shift, values, indices = ctx.saved_tensors
        table = W_enc.t().contiguous()
        latents = table.shape[0]
        active = grad_values * (values > 0)
        needs_x, needs_W, needs_b, needs_shift = ctx.needs_input_grad[:4]
        grad_x = grad_W = grad_b = grad_shift = None
        if needs_x:
            grad_x = sparse_times_table(active, indices, table)
        if needs_W:
            grad_W = sparse_transposed_times(active, indices, x - shift, latents).t()
        if needs_b or needs_shift:
            grad_b = active.new_zeros(latents)
            grad_b.index_add_(0, indices.flatten(), active.flatten())
        if needs_shift:
            grad_shift = -(grad_b @ table)  # minus grad_x summed over the tokens
        return grad_x, grad_W, grad_b, grad_shift, None, None, None, None


class _Decode(torch.autograd.Function):
    """``S @ W``; the gradient of W is projected off its rows when these are unit vectors."""

    @staticmethod
    def forward(ctx, values, indices, W_dec, unit_rows):
        ctx.save_for_backward(values, indices, W_dec)
        ctx.unit_rows = unit_rows
        return sparse_times_table(values, indices, W_dec.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        values, indices, W_dec = ctx.saved_tensors
        table = W_dec.contiguous()
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = rows_dot_table(grad_y, table, indices)
        if ctx.needs_input_grad[2]:
            grad_W = sparse_transposed_times(values, indices, grad_y, table.shape[0])
            if ctx.unit_rows:
                along = _along(grad_W, table, values, indices, grad_values)
                grad_W.addcmul_(along[:, None], table, value=-1)
        return grad_values, None, grad_W, None


def _along(
    grad_W: Tensor, table: Tensor, values: Tensor, indices: Tensor, grad_values: Tensor | None
) -> Tensor:
    """``grad_W[n] . table[n]``, [N]. The gradient of the values has these products already, an
    entry at a time: summed by latent, they spare two passes over [N, D] and a matrix as large."""
    if grad_values is None or is_dense(SparseFeatures(values, indices), len(table)):
        return torch.linalg.vecdot(grad_W, table)
    along = values.new_zeros(len(table))
    return along.index_add_(0, indices.flatten(), (values * grad_values).flatten())


def sparse_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    shift: Tensor,
    k: int | None,
    extra_latents: Tensor | None = None,
    extra_k: int = 0,
    budget: int | None = None,
) -> SparseFeatures:
    """ReLU(TopK((x - shift) W_enc + b_enc)) and its exact gradient, in O(T K D) backward.

    Neither the [T, N] pre-activations nor a gradient of that size outlive a block of tokens.

    Args:
        x: [T, D].
        W_enc: [D, N], quickest when its transpose is contiguous.
        b_enc: [N].
        shift: [D], subtracted from every row of x.
        k: active latents kept per token; None keeps every positive one, and where these are many
            (``DENSE_FROM``), all N entries.
        extra_latents: [n] latents of which the ``extra_k`` best are appended to every token's
            features (the auxiliary loss on dead latents); they may repeat the first k.
        extra_k: how many, at most n.
        budget: with no k, active latents kept of all tokens of all ranks together, the largest, and
            whatever equals the last of them; None keeps every positive one.

    Returns:
        values and indices, [T, K + extra_k]; with no k, K is the largest number of active latents,
        or N.
    """
    unbounded = k is None and budget is None and extra_latents is None
    if unbounded and _many_active(x, W_enc, b_enc, shift):
        values = torch.addmm(b_enc, x - shift, W_enc).relu()
        indices = torch.arange(W_enc.shape[1], device=x.device)
        return SparseFeatures(values, indices.expand_as(values))
    return SparseFeatures(*_Encode.apply(x, W_enc, b_enc, shift, k, budget, extra_latents, extra_k))


@torch.no_grad()
def _many_active(x: Tensor, W_enc: Tensor, b_enc: Tensor, shift: Tensor) -> bool:
    scores = torch.addmm(b_enc, x[:PROBED] - shift, W_enc)
    return bool(((scores > 0).sum(1) > DENSE_FROM * scores.shape[1]).any())


def sparse_decode(features: SparseFeatures, W_dec: Tensor, unit_rows: bool = False) -> Tensor:
    """Sum of the active decoder rows: features [T, K], W_dec [N, D] -> [T, D].

    Args:
        features: values and indices, [T, K].
        W_dec: [N, D].
        unit_rows: the rows are held at unit length, so the gradient of W_dec is the part of it
            orthogonal to each row: that of decoding with ``W_dec / |W_dec|``.
    """
    values, indices = features
    if not is_dense(features, len(W_dec)):
        values, indices = values.contiguous(), indices.contiguous()  # embedding-bag insists
    return _Decode.apply(values, indices, W_dec, unit_rows)
