"""What a strategy keeps of weights, gradients and optimizer on every rank.

P trainable parameters, n ranks. Read from DeepSpeed 0.19 and from torch's DistributedDataParallel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from steerlora.config import TrainerConfig

FLOAT = 4
"""Bytes of a float32, the type of what trains whatever the base's."""

REDUCE_BUCKET = 200_000_000
"""Entries of DeepSpeed's bucket of gradients on their way to their owner, filled or not, by
Lightning's default; stage 2 has two, of which one is filled while the other is sent."""
REUSE_DISTANCE = 1_000_000_000
"""ZeRO-3 keeps gathered weights that are used again within so many entries (DeepSpeed's default):
at the turn from forward to backward, those of the last half of it."""


class Precision(NamedTuple):
    """Bytes of an entry.

    Attributes:
        compute: of an activation and of the base's weights.
        trained: of a trainable weight.
    """

    compute: int
    trained: int


class Held(NamedTuple):
    """Bytes on one rank, whatever the batch.

    Attributes:
        weights: of the base.
        adapter: weights of the adapter.
        gradients, optimizer: of what trains.
        buffers: buckets of gradients, and weights gathered for the layers at work.
        stepping: on top, while the optimizer steps.
        host: what is offloaded to the CPU's memory.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    buffers: float = 0
    stepping: float = 0
    host: float = 0


def precision(trainer: TrainerConfig) -> Precision:
    """The base has the type that it computes in; what trains is float32 always, under DeepSpeed too
    (``distributed/zero.py``)."""
    return Precision(FLOAT if trainer.precision == "32-true" else FLOAT // 2, FLOAT)


def sizes(parameters: Iterable[Tensor]) -> dict[int, int]:
    """{entries of a parameter: how many such parameters}."""
    return Counter(parameter.numel() for parameter in parameters)


def held(trainer: TrainerConfig, ranks: int, base: dict[int, int], trained: dict[int, int]) -> Held:
    """Weights, gradients and optimizer of one rank.

    Args:
        trainer: strategy, offloading and precision.
        ranks: n.
        base: :func:`sizes` of what is frozen.
        trained: likewise, of what trains.
    """
    kinds = precision(trainer)
    weights, adapter = kinds.compute * _entries(base), kinds.trained * _entries(trained)
    gradients, moments = adapter, 2 * adapter
    if trainer.strategy in ("single", "ddp"):  # ranks send gradients from where they lie
        return Held(weights, adapter, gradients, moments)
    gradients, moments, shard = gradients / ranks, moments / ranks, adapter / ranks
    bucket = kinds.trained * REDUCE_BUCKET
    if trainer.strategy == "zero2":
        # Each rank's optimizer works on a copy of its share of the weights.
        if trainer.offload:
            return Held(weights, adapter, 0, 0, 2 * bucket, 0, gradients + moments + shard)
        return Held(weights, adapter, gradients, moments + shard, 2 * bucket, shard)
    whole = 0.0
    if ranks > 1 or trainer.offload:
        whole = _gathered(kinds, base, trained, trainer.persistent_elements)
    if trainer.offload:
        host = weights / ranks + 2 * shard + gradients + moments
        return Held(0, 0, 0, 0, bucket + whole, 0, host)
    return Held(weights / ranks, shard, gradients, moments, bucket + whole, shard)


def _gathered(
    kinds: Precision, base: dict[int, int], trained: dict[int, int], persistent: int
) -> float:
    """Weights that ZeRO-3 has whole: the small ones always, others for the layers at work."""
    small = kinds.compute * _entries(base, persistent)
    small += kinds.trained * _entries(trained, persistent)
    at_work = min(_entries(base) + _entries(trained), REUSE_DISTANCE / 2 + max(base, default=0))
    return small + kinds.compute * at_work


def _entries(parameters: dict[int, int], largest: float = math.inf) -> int:
    """All entries of parameters of at most so many."""
    return sum(size * count for size, count in parameters.items() if size <= largest)
