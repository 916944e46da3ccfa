"""What activations are of: the domains' rows, and a corpus beside them where one is given.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count, cycle, islice

import torch
from torch import Tensor

from steerlora.config import Config
from steerlora.data.batches import ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.data.corpus import identity_of_corpus, windows
from steerlora.data.harvest import HARVEST_ROWS


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text that is given, as a step's settings hold it; without one, empty."""

    path: str | None = None
    """By one name of its place, or a hub id."""
    identity: str = ""
    """Of its content."""

    @classmethod
    def of(cls, config: Config) -> Corpus:
        """``sae.corpus``.

        Raises:
            UserError: it holds no text.
        """
        if config.sae.corpus is None:
            return cls()
        path, identity = identity_of_corpus(config.sae.corpus, config.artifacts.root)
        return cls(path=path, identity=identity)


@dataclass(frozen=True)
class SAEText:
    """Text for SAEs, in batches (input_ids [B, S], attention_mask [B, S]).

    Attributes:
        rows: of the domains, and general ones.
        corpus: beside them, or None.
        tokenizer: of the model.
        max_length: tokens of a window of the corpus.
        seed: of the order of rows.
    """

    rows: list[EncodedChat]
    corpus: str | None
    tokenizer: object
    max_length: int
    seed: int

    def once(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass for so many tokens: the rows; with a corpus, rows of half the tokens, then the
        corpus, then the other rows, which only a short corpus leaves room for."""
        if self.corpus is None:
            yield from self._pass(self.rows)
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        rows = [self.rows[index] for index in order]
        so_far = accumulate(len(row.input_ids) for row in rows)
        half = sum(one <= tokens // 2 for one in so_far)
        yield from self._pass(rows[:half])
        yield from self._windows(self.corpus)
        yield from self._pass(rows[half:])

    def again(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass ``number`` of many, each in another order of rows. With a corpus a pass is one over
        it, in its own order; batches of rows come between, with as many tokens."""
        if self.corpus is None:
            yield from self._pass(self.rows, number)
            return
        batches, step, ahead = self._batches(self.rows), 0, 0
        for window in self._windows(self.corpus):
            yield window
            ahead += int(window[1].sum())
            while ahead > 0:
                batch = batches(step)
                yield batch.input_ids, batch.attention_mask
                ahead -= batch.tokens
                step += 1

    def drawn(self, number: int) -> list[EncodedChat]:
        """So many rows for a training on whole texts. With a corpus, windows from its beginning
        give about half of their tokens; what is too short is taken again."""
        if self.corpus is None:
            return self.rows
        per_row = sum(len(row.input_ids) for row in self.rows) / len(self.rows)
        share = per_row / (per_row + self.max_length)
        asked = max(1, round(number * share))
        windows = [
            EncodedChat(ids[real.bool()].tolist(), 0)
            for batch in islice(self._windows(self.corpus), -(-asked // HARVEST_ROWS))
            for ids, real in zip(*batch, strict=True)
        ]
        rows = islice(cycle(self.rows), max(1, number - asked))
        return [*islice(cycle(windows), asked), *rows]

    def _windows(self, corpus: str) -> Iterator[tuple[Tensor, Tensor]]:
        return windows(corpus, self.tokenizer, self.max_length, HARVEST_ROWS)

    def _pass(self, rows: list[EncodedChat], number: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if not rows:
            return
        batches = self._batches(rows)
        each = len(rows) // batches.batch_size
        for batch in map(batches, islice(count(number * each), each)):
            yield batch.input_ids, batch.attention_mask

    def _batches(self, rows: list[EncodedChat]) -> ChatBatches:
        return ChatBatches(
            rows,
            [-1] * len(rows),
            batch_size=HARVEST_ROWS,
            pad_token_id=self.tokenizer.pad_token_id,
            seed=self.seed,
        )
