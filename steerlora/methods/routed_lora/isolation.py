"""Specialists that stay as they are, to the bit, while the others train.

E specialists, R rank of each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from steerlora.methods.routed_lora.adapter import Adapter


@contextmanager
def train_only(adapter: Adapter, specialists: Collection[int]) -> Iterator[None]:
    """Inside, gradients of the other specialists' rows of A and columns of B are zero.

    They are zeroed as they are computed, before anything reads them: clipping counts only what
    trains, and AdamW, if it is a fresh one without weight decay,
    leaves the others bit for bit unchanged. Routers are not held.

    Args:
        adapter: the adapter.
        specialists: which ones train; to freeze some, all but those.

    Raises:
        ValueError: none, or one that the adapter does not have.
    """
    config = adapter.config
    unknown = sorted(set(specialists) - set(range(config.specialists)))
    if unknown or not specialists:
        raise ValueError(
            f"specialists to train {sorted(specialists)}: choose from 0 to {config.specialists - 1}"
        )

    @cache
    def held(device: torch.device) -> Tensor:
        """[E*R], True on what stays; known on a device only once a gradient is there."""
        owner = torch.arange(config.specialists, device=device).repeat_interleave(config.rank)
        return torch.isin(owner, torch.tensor(sorted(specialists), device=device), invert=True)

    def hold_rows(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(held(gradient.device)[:, None], 0)

    def hold_columns(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(held(gradient.device), 0)

    hooks = []
    for layer in adapter.layers.values():
        hooks += [layer.A.register_hook(hold_rows), layer.B.register_hook(hold_columns)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
