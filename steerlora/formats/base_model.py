"""Which base model this is: a fingerprint that survives a change of dtype or device."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 64
"""Values of each weight that enter the fingerprint: enough to tell any two trainings apart."""


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 (20 hex digits) over names, shapes and a fixed sample of every base weight.

    Values are read as bfloat16, so that one model loaded in several precisions stays the same
    model. Weights that an adapter added, and the names it wraps, do not enter.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(model)):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        # In float64: float32 steps over the last position of an embedding of 1e8 values.
        count = min(SAMPLES, flat.numel())
        positions = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
        sample = flat[positions.to(flat.device)].to(torch.bfloat16).view(torch.int16)
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def _base_weights(model: nn.Module):
    for name, weight in model.named_parameters():
        if ".low_rank." not in name:
            yield name.replace(".base.", ".").replace(".layer.", "."), weight
