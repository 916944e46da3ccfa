"""What a decoder's forward is called with, for those who watch it.

B batch, S sequence, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from steerlora.lm.decoder import decoder_of
from steerlora.lm.signal_tokens import ALL_TOKENS, SignalTokens


@dataclass
class ForwardArguments:
    """What a decoder's forward was called with, as far as those need to know who watch it."""

    input_ids: Tensor | None = None
    """[B, S]; None where embeddings were given."""
    attention_mask: Tensor | dict[str, Tensor | None] | None = None
    """[B, S so far] or None; or as layers read it, [B, 1, S, columns], one or one a kind."""
    position_ids: Tensor | None = None
    """[B, S] or None; of packed rows, negative on padding."""
    cache: Cache | None = None
    """The KV cache that was given."""
    past: int = 0
    """Tokens of these sequences that it held."""
    mixed: bool = False
    """Several sequences in one row, their caches in pages (transformers' continuous batching)."""

    def note(self, given: dict[str, Any]) -> None:
        """Take over what the decoder is called with."""
        self.input_ids = given.get("input_ids")
        self.attention_mask = given.get("attention_mask")
        self.position_ids = given.get("position_ids")
        self.cache = given.get("past_key_values")
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.mixed = given.get("cache") is not None

    @property
    def continuing(self) -> bool:
        """A KV cache holds earlier tokens of these sequences."""
        return self.past > 0

    def real_tokens(self, stream: Tensor) -> Tensor:
        """True on real tokens of a stream [B, S, D], [B, S]; with a KV cache, the mask's end.

        A mask that the layers read says it on its diagonal: a token that nobody may see, itself
        included, is padding.
        """
        batch, length = stream.shape[:2]
        mask, positions = self.attention_mask, self.position_ids
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask[:, -length:].bool()
        seen = self._seen(mask)
        if seen is not None:
            known = seen.shape[-1] >= self.past + length  # else columns of a window, which end now
            seen = seen[:, :, self.past : self.past + length] if known else seen[:, :, -length:]
            return seen.diagonal(dim1=1, dim2=2).expand(batch, length)
        if positions is not None and positions.dim() == 2:
            return (positions >= 0).expand(batch, length)
        return torch.ones(batch, length, dtype=torch.bool, device=stream.device)

    def signal_tokens(self, stream: Tensor, rule: SignalTokens) -> Tensor:
        """True on the tokens of a stream [B, S, D] that carry a signal, [B, S]."""
        real = self.real_tokens(stream)
        if rule == ALL_TOKENS:
            return real
        return rule(self.input_ids, real, self._positions(real))

    def _positions(self, real: Tensor) -> Tensor:
        """Of each token in its own sequence, [B, S], where it is ``real`` [B, S]."""
        batch, length = real.shape
        if self.position_ids is not None and self.position_ids.dim() == 2:
            return self.position_ids.expand(batch, length)
        so_far = self.mask_so_far()
        if so_far is None:
            places = torch.arange(self.past, self.past + length, device=real.device)
            return places.expand(batch, length)
        return (so_far.long().cumsum(1) - 1)[:, -length:]

    def mask_so_far(self) -> Tensor | None:
        """Of all tokens of the sequences, those of this forward included: [B, S so far], 1 on real
        ones; None: all are.

        Raises:
            RuntimeError: the layers' mask has a window alone, which earlier tokens have left.
        """
        seen = self._seen(self.attention_mask)
        if seen is None:
            return self.attention_mask if isinstance(self.attention_mask, Tensor) else None
        length = seen.shape[1]
        if seen.shape[-1] < self.past + length:
            raise RuntimeError(
                "a mask of a sliding window does not say which earlier tokens are padding: use a "
                "dynamic cache"
            )
        if not self.past:
            return seen[:, :, :length].diagonal(dim1=1, dim2=2).long()
        return seen[:, -1, : self.past + length].long()  # the last token may see all real ones

    def _seen(self, mask: Any) -> Tensor | None:
        """Who sees whom, [B, S, columns] bool, where a mask [B, 1, S, columns] says it."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return None
        return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


class ObservedForward:
    """Calls functions with a decoder's arguments, by name, around every forward of it.

    It takes the place of the decoder's ``forward``; :meth:`remove` undoes it exactly. It is an
    object, not a function, so that a copy of the decoder has one of its own.

    Args:
        model: a causal language model.
        before: called with {argument: value}.
        after: called with that and the output; None: nothing is.

    Raises:
        ValueError: a decoder that keeps no keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[dict[str, Any]], None],
        after: Callable[[dict[str, Any], Any], None] | None = None,
    ) -> None:
        self._decoder = decoder = decoder_of(model)
        self._own = vars(decoder).get("forward")
        self._names = parameters_of_forward(decoder)
        self._before, self._after = before, after
        decoder.forward = self

    def __call__(self, *args, **kwargs):
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._before(given)
        # Not kept: pickle would look a bound method up on a decoder that this object stands in.
        forward = self._own or partial(type(self._decoder).forward, self._decoder)
        output = forward(**given)
        if self._after is not None:
            self._after(given, output)
        return output

    def remove(self) -> None:
        del self._decoder.forward
        if self._own is not None:
            self._decoder.forward = self._own


def cache_after(given: dict[str, Any], output: Any) -> Cache | None:
    """The KV cache that a forward has filled: the one it was given, or one that it made.

    Args:
        given: {argument: value} of the decoder's forward.
        output: what it returned.
    """
    parts = output if isinstance(output, tuple) else vars(output).values()
    found = [part for part in (given.get("past_key_values"), *parts) if isinstance(part, Cache)]
    return found[0] if found else None


def parameters_of_forward(decoder: nn.Module) -> list[str]:
    """The names that a decoder's forward knows its positional arguments by.

    Raises:
        ValueError: a decoder that keeps no keys and values.
    """
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]
    if "past_key_values" not in names:
        raise ValueError(
            f"{type(decoder).__name__} keeps no keys and values (its forward takes "
            f"{', '.join(names)}): an adapter needs an attention decoder"
        )
    return names
