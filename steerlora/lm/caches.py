"""What is kept of a KV cache's tokens beside keys and values: one more layer of that cache.

B batch, S tokens in the cache.

Whoever watches a decoder and needs more of the earlier tokens than their keys and values has to
keep it where transformers keeps those. A cache is reordered by beams, cropped by assisted
generation, repeated for several samples, copied to be used again, reset, and handed from one chat
to the next; a state that lies anywhere else is then the state of other tokens. Each of these
operations goes over ``cache.layers`` and has every layer do it to itself, or copies the whole list.
So a layer appended to that list follows the cache, whatever kind of cache it is, and no operation
has to be watched. This relies on two things: a ``Cache`` has a list ``layers``, and a decoder reads
the layers of its own numbers only. The layer is appended when a forward has ended, since some
caches make their layers during the first one, by number.

What follows from all tokens together (a running sum) cannot be cropped. So :class:`TokensLayer`
keeps each token's own part, and that sum beside it: a crop drops the sum, and its owner computes it
again.

Such a layer grows with its tokens in a static cache too. Decoding can be compiled all the same,
since nothing that is compiled reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

Nest = Any
"""None, a tensor, or a named tuple of such."""


def mapped(function: Callable[[Tensor], Tensor], nest: Nest) -> Nest:
    """``function`` of every tensor in a nest, which keeps its form."""
    if nest is None:
        return None
    if isinstance(nest, Tensor):
        return function(nest)
    return type(nest)(*(mapped(function, part) for part in nest))


def is_empty(nest: Nest) -> bool:
    """Whether there is no tensor in it."""
    return nest is None or (not isinstance(nest, Tensor) and all(map(is_empty, nest)))


class BesideLayer(DummyLayer):
    """A layer of a cache that holds no keys and values, and that no layer of the decoder reads.

    Transformers calls such a layer a dummy: no mask is made for it, and offloading passes over it.

    Args:
        owner: who keeps something here.
    """

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner

    @classmethod
    def of(cls, cache: Cache | None, owner: str) -> Self | None:
        """The layer of this owner in a cache; None: it has none."""
        for layer in reversed(getattr(cache, "layers", [])):
            if isinstance(layer, cls) and layer.owner == owner:
                return layer
        return None

    @classmethod
    def at(cls, cache: Cache, owner: str) -> Self:
        """The layer of this owner in a cache that a forward has filled; appended if absent."""
        found = cls.of(cache, owner)
        if found is None:
            found = cls(owner)
            cache.layers.append(found)
        return found


class TokensLayer(BesideLayer):
    """Rows of tokens, and what they leave behind together.

    Attributes:
        tokens: a nest of [B, S, ...]; None: of no token yet.
        together: a nest of [B, ...] that follows from ``tokens``; None where it has to be computed
            again.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.tokens: Nest = None
        self.together: Nest = None
        self._length = 0

    def append(self, tokens: Nest, together: Nest) -> None:
        """Add new tokens' rows to those that are here.

        Of a last dimension that varies, as the number of active latents may, the narrower is filled
        with zeros.
        """
        tokens, together = (mapped(Tensor.detach, nest) for nest in (tokens, together))
        self.tokens = tokens if self.tokens is None else _joined(self.tokens, tokens)
        self.together, self._length = together, _length(self.tokens)

    def get_seq_length(self) -> int:
        """Tokens that are here."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        if tokens_to_remove and self.tokens is not None:
            self._length = max(0, self._length + tokens_to_remove)
            self.tokens = mapped(lambda rows: rows[:, : self._length], self.tokens)
            self.together = None

    def reset(self) -> None:
        self.tokens, self.together, self._length = None, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda rows: rows[indices, ...])

    def _rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.tokens, self.together = (
            mapped(function, nest) for nest in (self.tokens, self.together)
        )


class CacheLayer(BesideLayer):
    """A second KV cache, of another forward of the same tokens.

    Attributes:
        cache: it; None: of no token yet.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.cache: Cache | None = None

    def get_seq_length(self) -> int:
        """Tokens that it holds."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        self._each("crop", tokens_to_remove)

    def reset(self) -> None:
        self.cache = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each("batch_select_indices", indices)

    def _each(self, name: str, argument: Any) -> None:
        if self.cache is not None:
            getattr(self.cache, name)(argument)


def _length(nest: Nest) -> int:
    while not isinstance(nest, Tensor):
        nest = next(part for part in nest if part is not None)
    return nest.shape[1]


def _joined(before: Nest, after: Nest) -> Nest:
    """Two nests of one form, one after the other along S."""
    if before is None:
        return None
    if not isinstance(before, Tensor):
        return type(before)(*(_joined(*parts) for parts in zip(before, after, strict=True)))
    if before.dim() > 2:
        width = max(before.shape[-1], after.shape[-1])
        before, after = (F.pad(rows, (0, width - rows.shape[-1])) for rows in (before, after))
    return torch.cat([before, after], 1)
