"""Residual-stream activations on disk, one store a site, and their shuffled reading.

Shapes: T tokens, D model width. A *site* c names the stream entering layer c.

On disk: ``shard_<i>.safetensors`` with the tensors ``activations`` [t, D], in the model's own type,
and ``norms`` [t] of them; and ``store.json``, written last: without it there is no store. Token t
is the same token in every store of the same text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from steerlora.errors import UserError
from steerlora.lm.outliers import usual_tokens

STORE_FILE = "store.json"
ACTIVATIONS, NORMS = "activations", "norms"
"""Names of a shard's tensors."""
# A store up to this size is copied into memory; a larger one stays mapped from its files.
_MEMORY_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """What ``store.json`` holds."""

    site: int
    width: int
    """D."""
    dtype: str
    """Name of the stored torch type, such as ``bfloat16``."""
    shard_tokens: tuple[int, ...]
    """Tokens of each shard."""
    without_signal: int
    """Real tokens that carry no signal, and are not stored."""


class ActivationStore:
    """Harvested activations of one site.

    Args:
        directory: what ``harvest`` wrote.

    Attributes:
        contents: site, width, type and shards.

    Raises:
        UserError: no complete store there.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / STORE_FILE
        if not path.is_file():
            raise UserError(f"no activations in {directory}: {STORE_FILE} is missing; harvest them")
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.contents = Harvest(**stored | {"shard_tokens": tuple(stored["shard_tokens"])})
        self._paths = [
            shard_path(directory, index) for index in range(len(self.contents.shard_tokens))
        ]

    @property
    def width(self) -> int:
        """D."""
        return self.contents.width

    @property
    def tokens(self) -> int:
        """How many tokens are stored, T."""
        return sum(self.contents.shard_tokens)

    def usual(self) -> Tensor:
        """[T] bool, tokens that are no outliers at this site (`steerlora.lm.outliers`)."""
        norms = []
        for path in self._paths:
            with safe_open(path, "pt") as file:
                norms.append(file.get_tensor(NORMS))
        return usual_tokens(torch.cat(norms))

    def rows(self, positions: Tensor) -> Tensor:
        """Activations [t, D] of the tokens at ``positions`` [t], in storage order numbers."""
        if len(self._shards) == 1:
            return self._shards[0][positions]
        ends = torch.tensor(list(accumulate(len(shard) for shard in self._shards)))
        shard_of = torch.searchsorted(ends, positions, right=True)
        out = self._shards[0].new_empty(len(positions), self.width)
        for index in shard_of.unique().tolist():
            here = shard_of == index
            shard = self._shards[index]
            out[here] = shard[positions[here] - (ends[index] - len(shard))]
        return out

    @cached_property
    def _shards(self) -> list[Tensor]:
        """One tensor in memory if they are small, else as many as are mapped from their files."""
        rows = [load_file(path)[ACTIVATIONS] for path in self._paths]
        small = sum(shard.nbytes for shard in rows) <= _MEMORY_BYTES
        return [torch.cat(rows)] if small else rows


class ActivationBatches:
    """Batches of stored activations as a function of the step alone, in an exact shuffle.

    Each pass over the stores is a fresh permutation of the tokens that are outliers at none of
    them; a batch may span two.

    Args:
        stores: of one text: of one site, or of several whose activations of the same tokens come
            side by side.
        batch_size: tokens of the whole batch.
        seed: of the permutations.

    Attributes:
        tokens: of a pass.

    Raises:
        UserError: the stores are not of the same text.
    """

    def __init__(self, stores: Sequence[ActivationStore], batch_size: int, seed: int) -> None:
        counts = {store.contents.site: store.tokens for store in stores}
        if len(set(counts.values())) > 1:
            raise UserError(f"activations of different texts, {{site: tokens}} = {counts}")
        self.stores, self.batch_size, self.seed = stores, batch_size, seed
        usual = torch.stack([store.usual() for store in stores]).all(0)
        self._kept = None if usual.all() else usual.nonzero()[:, 0].int()
        self.tokens = int(usual.sum())
        self._order: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tensor:
        """[batch_size, D] in the stored type, or [batch_size, sites, D] of several sites."""
        return self.part(step, 0, 1)

    def part(self, step: int, index: int, parts: int) -> Tensor:
        """[batch_size / parts, ...]: rows ``index``, ``index + parts``, ... of the batch, the only
        ones that are read."""
        size = self.batch_size
        positions = torch.arange(step * size + index, (step + 1) * size, parts)
        passes = positions // self.tokens
        chosen = torch.cat(
            [
                self._permutation(number)[positions[passes == number] % self.tokens]
                for number in passes.unique().tolist()
            ]
        )
        found = [store.rows(chosen.long()) for store in self.stores]
        return found[0] if len(found) == 1 else torch.stack(found, 1)

    def _permutation(self, number: int) -> Tensor:
        """The order of pass ``number``, int32 [tokens]; the last one is kept."""
        if self._order is None or self._order[0] != number:
            order = permutation(self.tokens, self.seed, number)
            self._order = (number, order if self._kept is None else self._kept[order])
        return self._order[1]


def permutation(count: int, seed: int, number: int) -> Tensor:
    """A random order of so many, int32 [count]: another for every seed and number."""
    # torch reads 32 bits of a seed: mix both numbers down to that many.
    mixed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(count, generator=generator, dtype=torch.int32)


def finite_norms(rows: Tensor, site: int) -> Tensor:
    """Norms [T] of activations [T, D] at a site.

    Raises:
        UserError: one is not finite.
    """
    norms = rows.float().norm(dim=1)
    if not norms.isfinite().all():
        raise UserError(
            f"the stream entering layer {site} holds numbers that are not finite: the model's "
            "weights are damaged, or its precision is too low for it"
        )
    return norms


def shard_path(directory: Path, index: int) -> Path:
    """Where a store's shard lies."""
    return directory / f"shard_{index:05d}.safetensors"
