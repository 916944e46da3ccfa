"""Several conversations a row: long rows that are full, in place of rows that are mostly padding.

B rows of a batch, S length of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from steerlora.config import TrainerConfig
from steerlora.data.batches import IGNORED, ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.distributed import ranks
from steerlora.lm.signal_tokens import ALL_TOKENS, SignalTokens

WINDOW = 4096
"""Conversations that are fitted into rows together."""

_log = logging.getLogger(__name__)


def training_batches(
    rows: Sequence[EncodedChat],
    domains: Sequence[int],
    trainer: TrainerConfig,
    *,
    pad_token_id: int,
    seed: int,
    signal_tokens: SignalTokens = ALL_TOKENS,
) -> ChatBatches | PackedBatches:
    """The batches of an adapter's training, packed where ``trainer.packing`` says so."""
    settings = {
        "batch_size": trainer.batch_size,
        "pad_token_id": pad_token_id,
        "seed": seed,
        "signal_tokens": signal_tokens,
    }
    if not trainer.packing:
        return ChatBatches(rows, domains, **settings)
    packed = PackedBatches(rows, domains, length=trainer.max_length, **settings)
    if ranks.is_main():
        _log.info(
            "packing: %d conversations in %d rows of %d tokens, %.1f %% full",
            len(rows),
            len(packed.contents),
            packed.length,
            100 * packed.fill,
        )
    return packed


class PackedBatches:
    """Batches of packed rows as a function of the step alone; their order is new in every epoch.

    A row holds conversations of one domain, whole ones. Which ones is settled once: a domain's
    conversations, shuffled, are fitted into rows a ``WINDOW`` at a time, the longest first and each
    into the first row that has room (first-fit decreasing: at most 11/9 of the fewest rows possible
    and a few, Johnson 1973). As no conversation sees its neighbours, another choice of them would
    change nothing but the company in a batch, which the order of rows changes as well.

    Args:
        rows: the conversations.
        domains: the domain of each, or -1.
        batch_size: B, packed rows.
        length: S; no conversation is longer.
        pad_token_id: fills what is left of a row.
        seed: of every order.
        signal_tokens: which tokens carry a signal.

    Attributes:
        contents: of each packed row, the indices of its conversations in ``rows``.
        length: S: of the fullest row, where none fills ``length``.
        fill: share of the rows' tokens that are real.
    """

    def __init__(
        self,
        rows: Sequence[EncodedChat],
        domains: Sequence[int],
        *,
        batch_size: int,
        length: int,
        pad_token_id: int,
        seed: int,
        signal_tokens: SignalTokens = ALL_TOKENS,
    ) -> None:
        assert rows, "no rows to train on"
        self.rows, self.domains = rows, domains
        self.pad_token_id, self.seed, self.signal_tokens = pad_token_id, seed, signal_tokens
        lengths = np.array([len(row.input_ids) for row in rows])
        assert lengths.max() <= length, "a conversation longer than a row"
        self.contents = _packed(lengths, np.array(domains), length, seed)
        self.batch_size = min(batch_size, len(self.contents))
        self.length = max(int(lengths[row].sum()) for row in self.contents)
        self.fill = int(lengths.sum()) / (len(self.contents) * self.length)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __call__(self, step: int) -> ChatBatch:
        """The batch of ``step``, from 0."""
        epoch, position = divmod(step, len(self.contents) // self.batch_size)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.contents), generator=generator).tolist()
            self._epoch = (epoch, order)
        first = position * self.batch_size
        chosen = [self.contents[i] for i in self._epoch[1][first : first + self.batch_size]]
        return collate_packed(
            [[self.rows[index] for index in row] for row in chosen],
            [self.domains[row[0]] for row in chosen],
            self.pad_token_id,
            self.length,
            self.signal_tokens,
        )

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        """One of so many parts of the batch of ``step``."""
        return self(step).part(index, parts)


def collate_packed(
    rows: Sequence[Sequence[EncodedChat]],
    domains: Sequence[int],
    pad_token_id: int,
    length: int,
    signal_tokens: SignalTokens = ALL_TOKENS,
) -> ChatBatch:
    """Rows of several conversations each, padded on the right to ``length``; answers count.

    A conversation's first token is never a label: what stands before it is another's last.
    """
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id)
    labels, position_ids = torch.full(shape, IGNORED), torch.full(shape, -1)
    for index, row in enumerate(rows):
        start = 0
        for chat in row:
            ids = torch.tensor(chat.input_ids)
            end = start + len(ids)
            input_ids[index, start:end] = ids
            for first, stop in chat.answers:
                first = max(first, 1)
                labels[index, start + first : start + stop] = ids[first:stop]
            position_ids[index, start:end] = torch.arange(len(ids))
            start = end
    real = position_ids >= 0
    return ChatBatch(
        input_ids=input_ids,
        attention_mask=real.long(),
        labels=labels,
        domains=torch.tensor(list(domains)),
        tokens=int(real.sum()),
        position_ids=position_ids,
        signal_tokens=signal_tokens,
    )


def _packed(lengths: np.ndarray, domains: np.ndarray, length: int, seed: int) -> list[list[int]]:
    """Indices of the conversations of every row; a row's are of one domain."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for domain in np.unique(domains):
        own = np.flatnonzero(domains == domain)
        own = own[torch.randperm(len(own), generator=generator).numpy()]
        for start in range(0, len(own), WINDOW):
            window = own[start : start + WINDOW]
            window = window[np.argsort(-lengths[window], kind="stable")]
            found += _first_fit(window, lengths, length)
    return found


def _first_fit(order: np.ndarray, lengths: np.ndarray, length: int) -> list[list[int]]:
    """Put each, in this order, into the first row that has room for it."""
    rows: list[list[int]] = []
    room = np.full(len(order), length)  # of rows not begun yet too: the first has room for any
    for index in order.tolist():
        place = int(np.argmax(room >= lengths[index]))
        if place == len(rows):
            rows.append([])
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows
