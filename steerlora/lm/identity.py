"""Which base model this is: a fingerprint that survives a change of dtype or device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

SAMPLES = 64
"""Values of each weight that enter the fingerprint: enough to tell any two trainings apart."""


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 (20 hex digits) over names, shapes and a fixed sample of every base weight.

    Values are read as bfloat16, so that one model loaded in several precisions stays the same
    model. Weights that an adapter added, and the names it wraps, do not enter.
    """
    return fingerprint_of(_base_weights(model))


def fingerprint_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """:func:`model_fingerprint` of a base model's (name, weight) pairs, taken one by one."""
    digest = hashlib.sha256()
    for part in sorted(_sample(name, weight) for name, weight in weights):
        digest.update(part)
    return digest.hexdigest()[:20]


def _sample(name: str, weight: Tensor) -> bytes:
    """A weight's name without wrappers, its shape, and some of its values."""
    name = name.replace(".base.", ".").replace(".layer.", ".")
    flat = weight.detach().reshape(-1)
    # In float64: float32 steps over the last position of an embedding of 1e8 values.
    positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, len(flat)), dtype=torch.float64)
    values = flat[positions.long().to(flat.device)].to(torch.bfloat16).view(torch.int16)
    return f"{name}{tuple(weight.shape)}".encode() + values.cpu().numpy().tobytes()


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if ".low_rank." not in name:
            yield name, weight
