"""Which tokens carry a signal: one rule for SAEs, features, routing, interventions and losses.

B batch, S sequence.

What a chat template writes before every conversation is the same in all of them and says nothing of
any; a sequence's first token collects attention that has nowhere else to go, and from some layer on
its stream is far longer than the others' (Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024,
arXiv 2402.17762); special tokens mark where turns begin and end. In an average over a context they
would outweigh the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SignalTokens:
    """The rule. It leaves a token out by its id and its place in its own sequence, and by nothing
    else: so it is the same under padding, packing and a KV cache.

    Left out are

    - the first token of a sequence, whatever it is, where ``first`` says so;
    - the token at place p that equals ``prefix[p]``, and so all of the prefix in text that begins
      with it, and nothing more in text that begins otherwise;
    - the tokens in ``special``, wherever they stand.

    Without arguments it leaves nothing out.

    Attributes:
        prefix: token ids that every conversation begins with.
        special: token ids that are no text.
        first: whether the first token is left out.
    """

    prefix: tuple[int, ...] = ()
    special: tuple[int, ...] = ()
    first: bool = False

    def __call__(
        self, input_ids: Tensor | None, real: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Which tokens carry a signal, [B, S] bool.

        Args:
            input_ids: [B, S]; None where only embeddings are known: then by place alone.
            real: [B, S], True (or 1) on real tokens; the others carry none.
            positions: [B, S], of each real token in its own sequence, from 0; None: a row is one
                sequence, of which the row has the beginning.
        """
        real = real.bool()
        if self == ALL_TOKENS:
            return real
        if positions is None:
            positions = real.long().cumsum(1) - 1
        positions, kept = positions.to(real.device), real
        if self.first:
            kept = kept & (positions != 0)
        if input_ids is None:
            return kept
        input_ids = input_ids.to(real.device)
        if self.special:
            kept = kept & ~torch.isin(input_ids, _as(self.special, input_ids))
        if self.prefix:
            length = len(self.prefix)
            expected = _as(self.prefix, input_ids)[positions.clamp(0, length - 1)]
            kept = kept & ~((positions < length) & (input_ids == expected))
        return kept


ALL_TOKENS = SignalTokens()
"""Every real token carries a signal."""
NOT_FIRST = SignalTokens(first=True)
"""Every token but a sequence's first."""


def _as(ids: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=like.dtype, device=like.device)
