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
