"""What a rank's part of a batch weighs, so that ranks together compute the whole batch's loss.

Ranks average their gradients, and so do the parts that a rank takes one after the other. A mean
over the tokens of a part, weighted by the part's share of those tokens, averages to the mean over
all of them; a statistic that enters a loss otherwise than linearly is averaged over ranks itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _MeanOverRanks(torch.autograd.Function):
    """The mean of every rank's tensor. All ranks go on to the same loss, each with its gradient of
    the mean in hand: averaged over ranks it is the loss's, with no second exchange."""

    @staticmethod
    def forward(context, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / world()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's tensor, with gradient; with one rank, the tensor itself."""
    return value if world() == 1 else _MeanOverRanks.apply(value)


@torch.no_grad()
def sum_over_ranks(values: Iterable[Tensor]) -> list[Tensor]:
    """The sums over ranks of several tensors, without gradient, in one exchange."""
    values = [value.detach() for value in values]
    if world() == 1 or not values:
        return values
    kind = torch.promote_types(values[0].dtype, torch.float32)
    joined = torch.cat([value.reshape(-1).to(kind) for value in values])
    dist.all_reduce(joined)
    parts = joined.split([value.numel() for value in values])
    return [part.view(v.shape).to(v.dtype) for part, v in zip(parts, values, strict=True)]


@torch.no_grad()
def largest_over_ranks(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest of all ranks' values, or all of them where they are fewer.

    Args:
        values: [n] of this rank, all above 0; n at most ``count``.
        count: how many, the same on every rank.
    """
    if world() == 1:
        return values
    own = values.new_zeros(count)  # ranks exchange tensors of one size
    own[: len(values)] = values
    found = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(found, own)
    largest = torch.cat(found).topk(count, sorted=False).values
    return largest[largest > 0]


@torch.no_grad()
def least_over_ranks(value: Tensor) -> Tensor:
    """The smallest of every rank's values, entry by entry."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return value
