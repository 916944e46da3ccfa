"""Which base model this is: a fingerprint that survives a change of dtype or device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

CHUNK = 2**22
"""Values that are summed at a time: 32 MiB as integers."""
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, from the golden ratio, as a signed integer


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 (20 hex digits) over names, shapes and a sum over all values of every base weight.

    Values are read as bfloat16, so that one model loaded in several precisions stays the same
    model. Weights that an adapter added, and the names it wraps, do not enter.
    """
    return fingerprint_of(_base_weights(model))


def fingerprint_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """:func:`model_fingerprint` of a base model's (name, weight) pairs, taken one by one."""
    digest = hashlib.sha256()
    for part in sorted(_described(name, weight) for name, weight in weights):
        digest.update(part)
    return digest.hexdigest()[:20]


def _described(name: str, weight: Tensor) -> bytes:
    """A weight's name without wrappers, its shape, and a sum that every value changes."""
    name = name.replace(".base.", ".").replace(".layer.", ".")
    return f"{name}{tuple(weight.shape)}{_weighted_sum(weight.detach().reshape(-1))};".encode()


def _weighted_sum(values: Tensor) -> int:
    """Sum of each value's bits times a number of its place, modulo 2**64.

    In integers, so that the order in which a device adds does not matter.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK].to(torch.bfloat16).view(torch.int16).long()
        places = torch.arange(start + 1, start + 1 + len(chunk), device=values.device)
        mixed = places * _MULTIPLIER
        # By an odd number: no change of a single value is lost.
        total += (chunk * (mixed ^ (mixed >> 29) | 1)).sum()
    return int(total)


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if ".low_rank." not in name:
            yield name, weight
