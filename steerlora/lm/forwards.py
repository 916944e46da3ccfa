"""What a decoder's forward is called with, for those who watch it.

B batch, S sequence, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerlora.lm.decoder import decoder_of


@dataclass
class ForwardArguments:
    """What a decoder's forward was called with, as far as those need to know who watch it."""

    attention_mask: Tensor | None = None
    """[B, S so far] or None."""
    position_ids: Tensor | None = None
    """[B, S] or None; of packed rows, negative on padding."""
    continuing: bool = False
    """A KV cache holds earlier tokens of these sequences."""

    def note(self, given: dict[str, Any]) -> None:
        """Take over what the decoder is called with."""
        self.attention_mask = given.get("attention_mask")
        self.position_ids = given.get("position_ids")
        cache = given.get("past_key_values")
        self.continuing = cache is not None and cache.get_seq_length() > 0

    def real_tokens(self, stream: Tensor) -> Tensor:
        """True on real tokens of a stream [B, S, D], [B, S]; with a KV cache, the mask's end."""
        batch, length = stream.shape[:2]
        mask, positions = self.attention_mask, self.position_ids
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask[:, -length:].bool()
        if positions is not None and positions.dim() == 2:
            return (positions >= 0).expand(batch, length)
        return torch.ones(batch, length, dtype=torch.bool, device=stream.device)


class ObservedForward:
    """Calls a function with a decoder's arguments, by name, before every forward of it.

    It takes the place of the decoder's ``forward``; :meth:`remove` undoes it exactly.

    Args:
        model: a causal language model.
        before: called with {argument: value}.

    Raises:
        ValueError: a decoder that keeps no keys and values.
    """

    def __init__(self, model: nn.Module, before: Callable[[dict[str, Any]], None]) -> None:
        self._decoder = decoder = decoder_of(model)
        self._own = vars(decoder).get("forward")
        names, forward = parameters_of_forward(decoder), decoder.forward

        def observed(*args, **kwargs):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            before(given)
            return forward(**given)

        decoder.forward = observed

    def remove(self) -> None:
        del self._decoder.forward
        if self._own is not None:
            self._decoder.forward = self._own


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
