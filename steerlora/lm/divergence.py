"""Logits of what leaves the final norm, and how far two such streams are apart in them.

T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26
"""Logits of one model that are held at once: 256 MiB in float32."""


def output_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of what leaves the final norm, [..., D] -> [..., V], in float32 or more."""
    logits = model.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def kl_divergence(model: nn.Module, teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v), in nats.

    No more logits are held than ``MOST_LOGITS`` a model: where there are more tokens, those of a
    part of them are computed again in the backward.

    Args:
        model: whose output head both pass.
        teacher: [T, D], what leaves its final norm for p; without gradient.
        student: [T, D], likewise for q; differentiable.
    """
    rows = max(1, MOST_LOGITS // model.config.vocab_size)
    if len(student) <= rows:
        return _kl_divergence(model, teacher, student)
    parts = [
        checkpoint(_kl_divergence, model, p, q, use_reentrant=False, preserve_rng_state=False)
        for p, q in zip(teacher.split(rows), student.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def _kl_divergence(model: nn.Module, teacher: Tensor, student: Tensor) -> Tensor:
    with torch.no_grad():
        p = output_logits(model, teacher).log_softmax(-1)
    q = output_logits(model, student).log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="sum")
