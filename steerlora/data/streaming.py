"""Activations from the model to a training, shuffled in a bounded buffer and never stored.

Shapes: B batch, S sequence, T tokens, C columns, D model width. A *site* c names the stream
entering layer c. A *reader* has a site, or several whose activations of the same tokens it reads
side by side; each of its sites is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, count
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerlora.data.activations import finite_norms, permutation
from steerlora.errors import UserError
from steerlora.lm.decoder import residual_streams
from steerlora.lm.outliers import usual_tokens
from steerlora.lm.signal_tokens import SignalTokens

Text = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Of the number of a pass, from 0: its batches (input_ids [B, S], attention_mask [B, S])."""


@dataclass
class _Ahead:
    """The batch of text that is read next."""

    input_ids: Tensor
    mask: Tensor
    keep: Tensor
    """[B, S], tokens that carry a signal."""
    first: int
    """Number of the first of them, over the whole text."""
    stop: int
    """Number of the first of the batch after it."""
    rows: Tensor | None = None
    """[t, sites, D] of them, once they are computed."""


class _Chunk(NamedTuple):
    rows: Tensor
    """[buffer, sites, D]."""
    order: Tensor
    """[readers, buffer], in which each reads them."""


class StreamedActivations:
    """Batches of activations as a function of the step alone, from as many passes over a text as
    the steps need. Used as a context manager.

    Tokens that carry a signal are taken ``buffer`` at a time. A chunk of so many is shuffled whole,
    and batches are cut from the chunks in turn; so the buffer bounds both the memory and how far a
    token may move. While one chunk is read, a thread has the model fill the next: at most two are
    held.

    Of a chunk's outliers (`steerlora.lm.outliers`, by the chunk's median) at a reader's sites it
    reads none. Others of the chunk are read twice in their places, so that a step's tokens do not
    depend on how many there were before. What one reader reads does not depend on the others.

    Args:
        model: a causal language model in evaluation mode, on its own device.
        text: what it reads.
        readers: the sites of each.
        batch_size: tokens of the whole batch.
        buffer: tokens of a chunk.
        steps: of the training: no chunk is filled that they do not reach.
        seed: of the shuffles.
        signal_tokens: which tokens are taken.

    Attributes:
        columns: of each reader.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Text,
        readers: Sequence[Sequence[int]],
        *,
        batch_size: int,
        buffer: int,
        steps: int,
        seed: int,
        signal_tokens: SignalTokens,
    ) -> None:
        self.model, self.text = model, text
        self.sites = tuple(dict.fromkeys(chain.from_iterable(readers)))
        self._readers = [[self.sites.index(site) for site in sites] for sites in readers]
        ends = list(accumulate(map(len, readers)))
        self.columns = [slice(end - len(s), end) for end, s in zip(ends, readers, strict=True)]
        self.batch_size, self.buffer, self.seed = batch_size, buffer, seed
        self.signal_tokens = signal_tokens
        self._chunks = -(-steps * batch_size // buffer)
        self._batches: Iterator[_Ahead] | None = None
        self._ahead: _Ahead | None = None
        self._futures: dict[int, Future[_Chunk]] = {}
        self._thread, self._ended = ThreadPoolExecutor(1, "activations"), False

    def __enter__(self) -> StreamedActivations:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Tensor:
        """[batch_size, D] in the model's type, or [batch_size, C, D] of several columns.

        Raises:
            UserError: the text holds no token that carries a signal, or a stream is not finite.
        """
        return self.part(step, 0, 1)

    def part(self, step: int, index: int, parts: int) -> Tensor:
        """[batch_size / parts, ...]: rows ``index``, ``index + parts``, ... of the batch."""
        size = self.batch_size
        positions = torch.arange(step * size + index, (step + 1) * size, parts)
        numbers = positions // self.buffer
        found = []
        for number in numbers.unique().tolist():
            chunk, places = self._chunk(number), positions[numbers == number] % self.buffer
            each = zip(self._readers, chunk.order[:, places], strict=True)
            found.append(torch.cat([chunk.rows[order][:, sites] for sites, order in each], 1))
        rows = torch.cat(found)
        return rows if rows.shape[1] > 1 else rows[:, 0]

    def _chunk(self, number: int) -> _Chunk:
        """Chunk ``number``; the next one is asked for meanwhile, and others are let go."""
        asked = [one for one in (number, number + 1) if one == number or one < self._chunks]
        self._futures = {one: job for one, job in self._futures.items() if one in asked}
        for one in asked:
            if one not in self._futures:
                self._futures[one] = self._thread.submit(self._fill, one)
        return self._futures[number].result()

    @torch.no_grad()
    def _fill(self, number: int) -> _Chunk:
        """Run the text from the chunk's beginning, to which its tokens are only counted, to its
        end."""
        start, stop = number * self.buffer, (number + 1) * self.buffer
        if self._ahead is None or self._ahead.first > start:
            self._batches = self._text_batches()
            self._ahead = next(self._batches)
        rows: Tensor | None = None
        while True:
            if self._ended:
                raise CancelledError
            ahead = self._ahead
            if ahead.stop > start:
                if ahead.rows is None:
                    ahead.rows = self._run(ahead)
                if rows is None:
                    rows = ahead.rows.new_empty(self.buffer, *ahead.rows.shape[1:])
                part = ahead.rows[max(0, start - ahead.first) : stop - ahead.first]
                place = max(ahead.first, start) - start
                rows[place : place + len(part)] = part
            if ahead.stop >= stop:
                break
            self._ahead = next(self._batches)
        norms = [finite_norms(rows[:, i], site) for i, site in enumerate(self.sites)]
        usual = torch.stack([usual_tokens(one) for one in norms]).cpu()
        order = permutation(self.buffer, self.seed, number)
        kept = [usual[sites].all(0).nonzero()[:, 0] for sites in self._readers]
        orders = torch.stack([places[order % len(places)] for places in kept])
        return _Chunk(rows, orders.to(rows.device))

    def _run(self, ahead: _Ahead) -> Tensor:
        streams = residual_streams(self.model, ahead.input_ids, ahead.mask, self.sites)
        return torch.stack([streams[site][ahead.keep] for site in self.sites], 1)

    def _text_batches(self) -> Iterator[_Ahead]:
        device = next(self.model.parameters()).device
        position = 0
        for number in count():
            before = position
            for input_ids, mask in self.text(number):
                input_ids, mask = input_ids.to(device), mask.to(device)
                keep = self.signal_tokens(input_ids, mask)
                stop = position + int(keep.sum())
                yield _Ahead(input_ids, mask, keep, position, stop)
                position = stop
            if position == before:
                raise UserError("no activations: the texts hold no token that carries a signal")
