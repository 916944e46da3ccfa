"""The context of the control signal: this token's features, or a running average of them.

B batch, S sequence, O outputs (router logits), C tokens of a chunk.

A linear router commutes with averaging: the logits of averaged features are the averaged logits of
the features. So the average is taken over O numbers a token in place of N latents, and what it
leaves to later tokens is one vector of O numbers and one count a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CONTEXTS = ("token", "causal_mean", "ema")
CHUNK = 128
"""Tokens whose moving averages are one matrix product; longer sequences go chunk by chunk."""


class ContextState(NamedTuple):
    """What the tokens so far leave behind for the next ones.

    Attributes:
        total: [B, O]; weighted sum of the logits of the counted tokens so far.
        weight: [B, 1]; sum of their weights.
    """

    total: Tensor
    weight: Tensor


def average_so_far(
    logits: Tensor,
    counted: Tensor,
    context: str,
    decay: float,
    state: ContextState | None = None,
    restarts: Tensor | None = None,
) -> tuple[Tensor, ContextState | None]:
    """Average the logits over each sequence's counted tokens up to and including every position.

    - ``token``: the logits themselves.
    - ``causal_mean``: (sum_{s <= t} l_s) / (number of such tokens up to t).
    - ``ema``: sum_{s <= t} decay^(t - s) l_s, divided by the sum of the weights, where t - s counts
      such tokens; so the first token is not drawn towards zero.

    Other tokens (padding, and what carries no signal) do not count: their own output is the average
    so far, and before any token that counts their own logits, which are those of no features.

    Args:
        logits: [B, S, O].
        counted: [B, S], True on tokens that carry a signal.
        context: one of ``CONTEXTS``.
        decay: of ``ema``, in (0, 1).
        state: of the same sequences, where these tokens continue them (a KV cache).
        restarts: [B, S], True where another sample begins in the same row (packing): nothing before
            it counts. None: nowhere.

    Returns:
        [B, S, O] and the state after the last position; None with "token", which leaves none.
    """
    if context == "token":
        return logits, None
    if state is None:
        batch, _, outputs = logits.shape
        state = ContextState(logits.new_zeros(batch, outputs), logits.new_zeros(batch, 1))
    own = logits * counted.unsqueeze(-1)
    weights = counted.to(logits.dtype).unsqueeze(-1)
    if context == "causal_mean" and restarts is None:
        totals = own.cumsum(1) + state.total.unsqueeze(1)
        weights = weights.cumsum(1) + state.weight.unsqueeze(1)
    else:
        # Not a difference of two running sums at a restart: that keeps a rounding error of what
        # came before, and so of another sample.
        decay = decay if context == "ema" else 1.0
        totals, weights = _decayed_sums(own, weights, counted, decay, state, restarts)
    averages = totals / weights.clamp_min(torch.finfo(weights.dtype).tiny)
    averages = torch.where(weights > 0, averages, logits)
    # Copies: a view would keep the sums of all tokens alive.
    return averages, ContextState(totals[:, -1].clone(), weights[:, -1].clone())


def _decayed_sums(
    logits: Tensor,
    weights: Tensor,
    counted: Tensor,
    decay: float,
    state: ContextState,
    restarts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums with weight decay^(counted tokens since), of logits [B, S, O] and of ones [B, S, 1]."""
    columns = torch.cat([logits, weights], -1)
    before = torch.cat(state, -1)
    sample = torch.zeros_like(counted, dtype=torch.long) if restarts is None else restarts.cumsum(1)
    sample_before = torch.zeros_like(sample[:, :1])
    sums = []
    for start in range(0, columns.shape[1], CHUNK):
        part, own = columns[:, start : start + CHUNK], sample[:, start : start + CHUNK]
        age = counted[:, start : start + CHUNK].to(part.dtype).cumsum(1)
        # [B, C, C]; later tokens have no say in earlier ones, nor other samples in this one.
        powers = decay ** (age.unsqueeze(2) - age.unsqueeze(1)).clamp_min(0)
        powers = powers.tril() * (own.unsqueeze(2) == own.unsqueeze(1))
        fading = decay**age * (own == sample_before)
        part = powers @ part + fading.unsqueeze(-1) * before.unsqueeze(1)
        before, sample_before = part[:, -1], own[:, -1:]
        sums.append(part)
    joined = torch.cat(sums, 1)
    return joined[..., :-1], joined[..., -1:]
