"""Replay: text of the domains before it, and of its own past, in a domain's training.

``ReplayBatches`` gives some of the steps to earlier domains; ``ReplayRows`` adds rows to all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from steerlora.data.batches import ChatBatch


class ReplayBatches:
    """Batches as a function of the step alone: the current domain's, with earlier ones among them.

    Step s replays iff floor((s + 1) ratio) > floor(s ratio), so replays come evenly spread, and
    their share of any number of steps is the ratio's. A replay is one of the first ``kept`` batches
    of an earlier domain, both drawn uniformly from the seed and the step. The other steps take the
    current domain's batches in order and leave none out. (Published: ratio 0.2, 128 batches.)

    Args:
        current: the batch of a step of the current domain.
        earlier: likewise of every domain before it; with none there is nothing to replay.
        ratio: share of the steps that replay, in [0, 1).
        kept: batches that every earlier domain leaves behind.
        seed: of the draws.

    Raises:
        ValueError: a ratio outside [0, 1), or nothing kept.
    """

    def __init__(
        self,
        current: Callable[[int], ChatBatch],
        earlier: Sequence[Callable[[int], ChatBatch]],
        *,
        ratio: float,
        kept: int,
        seed: int,
    ) -> None:
        if not 0 <= ratio < 1:
            raise ValueError(f"replay ratio {ratio}: choose 0 (none) up to, but not, 1")
        if kept < 1:
            raise ValueError(f"{kept} replay batches: keep at least 1, or set the ratio to 0")
        self.current, self.earlier = current, earlier
        # As written: in floating point 0.29 of 100 steps would be 28 of them.
        self.ratio = Fraction(str(ratio)) if earlier else Fraction(0)
        self.kept, self.seed = kept, seed

    def __call__(self, step: int) -> ChatBatch:
        """The batch of ``step``, from 0."""
        replayed = step * self.ratio // 1
        if (step + 1) * self.ratio // 1 == replayed:
            return self.current(step - replayed)
        draws = np.random.SeedSequence([self.seed, step]).generate_state(2)
        return self.earlier[int(draws[0]) % len(self.earlier)](int(draws[1]) % self.kept)

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        """One of so many parts of the batch of ``step``."""
        return self(step).part(index, parts)


class ReplayRows:
    """Batches as a function of the step alone: the current domain's, each with replayed rows added.

    A batch of B rows gains floor(ratio B). Each is drawn by itself: a domain, uniformly among those
    so far, the current one included; one of the first ``kept`` batches that it has trained on; a
    row of that. So the current domain's first step gains rows of earlier domains only, and the very
    first none. (Published: ratio 0.2 of 32 rows, that is 6; 128 batches a domain.)

    Args:
        current, earlier, ratio, kept, seed: as for :class:`ReplayBatches`; 0 adds nothing.
        pad_token_id: fills the right.
    """

    def __init__(
        self,
        current: Callable[[int], ChatBatch],
        earlier: Sequence[Callable[[int], ChatBatch]],
        *,
        ratio: float,
        kept: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        self.current, self.earlier = current, earlier
        self.ratio, self.kept, self.seed = Fraction(str(ratio)), kept, seed
        self.pad_token_id = pad_token_id

    def __call__(self, step: int) -> ChatBatch:
        """The batch of ``step``, from 0."""
        batch = self.current(step)
        trained = [*((domain, self.kept) for domain in self.earlier)]
        if step:
            trained.append((self.current, min(step, self.kept)))
        count = len(batch.input_ids) * self.ratio // 1 if trained else 0
        draws = np.random.default_rng([self.seed, step])
        rows = []
        for _ in range(count):
            domain, batches = trained[draws.integers(len(trained))]
            replayed = domain(int(draws.integers(batches)))
            rows.append(replayed.row(int(draws.integers(len(replayed.input_ids)))))
        return batch.with_rows(rows, self.pad_token_id) if rows else batch

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        """One of so many parts of the batch of ``step``."""
        return self(step).part(index, parts)
