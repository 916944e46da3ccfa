"""Batches of conversations: padding, what the loss counts, parts for ranks, the order of rows.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.lm.signal_tokens import ALL_TOKENS, SignalTokens

Row = TypeVar("Row")

IGNORED = -100
"""Label of a token that does not enter the loss (torch's cross_entropy convention)."""
MOST_TOKENS = 2**15
"""Tokens of a batch that is only read, padding included: rows may be as long as the model's
context."""


class Shares(NamedTuple):
    """What a part of a batch weighs beside the other parts: 1 is an even share, and the whole's.

    A mean over the part's tokens, times the share, averages over all parts to the whole's mean.

    Attributes:
        labelled: of the tokens that the loss counts, with their weights.
        signal: of the tokens that carry a signal.
        owned: of such tokens of rows that have a domain.
        real: of all tokens but padding.
    """

    labelled: float = 1.0
    signal: float = 1.0
    owned: float = 1.0
    real: float = 1.0


WHOLE = Shares()


@dataclass(frozen=True)
class ChatBatch:
    """Right-padded conversations.

    Attributes:
        input_ids: [B, S].
        attention_mask: [B, S], 1 on real tokens.
        labels: [B, S], the token ids where the loss counts them, else ``IGNORED``.
        domains: [B], index of each row's domain; -1 where it has none.
        tokens: how many are real.
        weights: [B, S], weight of each labelled token in the loss; None: all alike.
        position_ids: [B, S], from 0 in every conversation of a packed row, -1 on padding; None:
            one conversation a row.
        shares: of a part; the whole's are 1.
        whole_tokens: real tokens of the whole batch; 0: this is the whole.
        signal_tokens: which tokens carry a signal, by which parts have their shares.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    domains: Tensor
    tokens: int
    weights: Tensor | None = None
    position_ids: Tensor | None = None
    shares: Shares = WHOLE
    whole_tokens: int = 0
    signal_tokens: SignalTokens = ALL_TOKENS

    def part(self, index: int, parts: int) -> ChatBatch:
        """Rows index, index + parts, ...: one of so many parts, with no more columns than it needs.

        Raises:
            UserError: the rows cannot be shared out evenly.
        """
        if len(self.input_ids) % parts:
            raise UserError(
                f"a batch of {len(self.input_ids)} rows cannot be shared by {parts} parts (ranks "
                "times trainer.accumulate): there may be no more training text than that"
            )
        rows = {
            name: value[index::parts]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        width = int(rows["attention_mask"].sum(1).max())
        rows = {name: v[:, :width] if v.dim() == 2 else v for name, v in rows.items()}
        own = replace(self, **rows, tokens=int(rows["attention_mask"].sum()))
        shares = (
            parts * mine / max(whole, 1e-9)
            for mine, whole in zip(own._counts(), self._counts(), strict=True)
        )
        return replace(own, shares=Shares(*shares), whole_tokens=self.tokens)

    def with_rows(self, rows: Sequence[ChatBatch], pad_token_id: int) -> ChatBatch:
        """This batch and after it the rows of others, all as wide as the widest.

        Raises:
            ValueError: some have weights or positions, and others have none.
        """
        batches = [self, *rows]
        width = max(batch.input_ids.shape[1] for batch in batches)
        fills = {
            "input_ids": pad_token_id,
            "attention_mask": 0,
            "labels": IGNORED,
            "weights": 0.0,
            "position_ids": -1,
        }
        joined = {"domains": torch.cat([batch.domains for batch in batches])}
        for name, fill in fills.items():
            parts = [getattr(batch, name) for batch in batches]
            if any(part is None for part in parts):
                if any(part is not None for part in parts):
                    raise ValueError(f"some of the batches have {name}, and others have none")
                continue
            padded = [F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
            joined[name] = torch.cat(padded)
        return replace(self, **joined, tokens=sum(batch.tokens for batch in batches))

    def row(self, index: int) -> ChatBatch:
        """One row, as a batch."""
        held = {n: v[index : index + 1] for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **held, tokens=int(held["attention_mask"].sum()))

    def _counts(self) -> tuple[float, float, float, float]:
        """Labelled tokens with their weights, tokens with a signal, those of rows that have a
        domain, and real ones."""
        labelled = self.labels[:, 1:] != IGNORED
        if self.weights is not None:
            labelled = labelled * self.weights[:, 1:]
        held = self.signal_tokens(self.input_ids, self.attention_mask, self.position_ids).sum(1)
        owned = held[self.domains >= 0]
        return tuple(float(c.sum()) for c in (labelled, held, owned, self.attention_mask))

    def to(self, device: torch.device | str) -> ChatBatch:
        held = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **held)


def collate(
    rows: Sequence[EncodedChat],
    domains: Sequence[int],
    pad_token_id: int,
    *,
    prompt_weight: float = 0.0,
    signal_tokens: SignalTokens = ALL_TOKENS,
) -> ChatBatch:
    """Pad ``rows`` on the right to the longest and mark where the loss counts.

    Answers always do; what is between them with ``prompt_weight``, not at all where it is zero.
    """
    shape = len(rows), max(len(row.input_ids) for row in rows)
    # As arrays, rows cost little: an operation of torch on each takes longer than its numbers do.
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    weights = np.full(shape, prompt_weight)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = row.input_ids
        attention_mask[index, :length] = 1
        for start, stop in [(0, length)] if prompt_weight else row.answers:
            labels[index, start:stop] = input_ids[index, start:stop]
        for start, stop in row.answers:
            weights[index, start:stop] = 1.0
    return ChatBatch(
        torch.tensor(input_ids),
        torch.tensor(attention_mask),
        torch.tensor(labels),
        torch.tensor(list(domains)),
        int(attention_mask.sum()),
        torch.tensor(weights, dtype=torch.get_default_dtype()) if prompt_weight else None,
        signal_tokens=signal_tokens,
    )


def evenly_spaced(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """So many of the rows at most, evenly spaced."""
    return rows[:: max(1, len(rows) // most)][:most]


def by_length(rows: Sequence[EncodedChat], size: int) -> Iterator[list[int]]:
    """Indices of every row once, the shortest first, in groups of a batch.

    A group has at most ``size`` rows, and `MOST_TOKENS` tokens where it has more than one row.
    """
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids)):
        full = (len(group) + 1) * len(rows[index].input_ids) > MOST_TOKENS
        if group and (full or len(group) == size):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def batches_by_length(
    rows: Sequence[EncodedChat], size: int, pad_token_id: int, domain: int = -1
) -> Iterator[ChatBatch]:
    """Every row once, the shortest first, so that little is padding.

    Args:
        rows: the conversations.
        size: B at most.
        pad_token_id: fills the right.
        domain: of all rows; -1: none.
    """
    for group in by_length(rows, size):
        yield collate([rows[index] for index in group], [domain] * len(group), pad_token_id)


class ChatBatches:
    """Batches as a function of the step alone, of rows of like length, reshuffled every epoch.

    An epoch's order is cut into windows of ``WINDOW`` batches; rows are sorted by length within a
    window, so that little is padding, and the batches of the epoch are then shuffled.

    Args:
        rows: the conversations.
        domains: the domain of each, or -1.
        batch_size: B.
        pad_token_id: fills the right.
        seed: of every order.
        prompt_weight: weight of prompt tokens in the loss; answers weigh 1.
        signal_tokens: which tokens carry a signal.
    """

    WINDOW = 16

    def __init__(
        self,
        rows: Sequence[EncodedChat],
        domains: Sequence[int],
        *,
        batch_size: int,
        pad_token_id: int,
        seed: int,
        prompt_weight: float = 0.0,
        signal_tokens: SignalTokens = ALL_TOKENS,
    ) -> None:
        assert rows, "no rows to train on"
        self.rows, self.domains = rows, domains
        self.batch_size = min(batch_size, len(rows))
        self.pad_token_id, self.seed, self.prompt_weight = pad_token_id, seed, prompt_weight
        self.signal_tokens = signal_tokens
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, step: int) -> ChatBatch:
        """The batch of ``step``, from 0."""
        epoch, position = divmod(step, len(self.rows) // self.batch_size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        chosen = self._epoch[1][position]
        return collate(
            [self.rows[index] for index in chosen],
            [self.domains[index] for index in chosen],
            self.pad_token_id,
            prompt_weight=self.prompt_weight,
            signal_tokens=self.signal_tokens,
        )

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        """One of so many parts of the batch of ``step``."""
        return self(step).part(index, parts)

    def _order(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        size, order = self.batch_size, torch.randperm(len(self.rows), generator=generator).tolist()
        order = order[: len(order) // size * size]
        batches = []
        for start in range(0, len(order), size * self.WINDOW):
            window = sorted(
                order[start : start + size * self.WINDOW],
                key=lambda index: len(self.rows[index].input_ids),
            )
            batches += [window[first : first + size] for first in range(0, len(window), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
