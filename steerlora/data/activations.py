"""Residual-stream activations on disk: harvested once, then read shuffled.

Shapes: B batch, S sequence, T tokens, D model width. A *site* c names the stream entering layer c.

On disk: ``site_<c>/shard_<i>.safetensors`` with one tensor ``activations`` [t, D] each, and
``store.json``, written last: without it there is no store. Token t is the same token at every site.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steerlora.errors import UserError, nearest
from steerlora.lm.decoder import residual_streams
from steerlora.lm.signal_tokens import NOT_FIRST, SignalTokens

STORE_FILE = "store.json"
HARVEST_ROWS = 64
"""Rows that a harvest runs at once."""
_SHARD_BYTES = 2**26
# A site up to this size is copied into memory; a larger one stays mapped from its files.
_MEMORY_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """What ``store.json`` holds."""

    width: int
    """D."""
    dtype: str
    """Name of the stored torch type, such as ``float32``."""
    sites: tuple[int, ...]
    shard_tokens: tuple[int, ...]
    """Tokens of each shard, the same at every site."""
    without_signal: int
    """Real tokens that carry no signal, and are not stored."""
    outliers_dropped: int


@dataclass
class _ShardWriter:
    """Collects tokens of all sites and writes them in shards of equal size."""

    directory: Path
    sites: tuple[int, ...]
    dtype: torch.dtype
    shard_tokens: list[int] = field(default_factory=list)
    _waiting: list[dict[int, Tensor]] = field(default_factory=list)
    _waiting_tokens: int = 0

    def add(self, streams: dict[int, Tensor]) -> None:
        """streams: {site: [t, D]}, the same t at every site."""
        rows = next(iter(streams.values()))
        shard = max(1, _SHARD_BYTES // (rows.shape[1] * self.dtype.itemsize))
        while len(rows):
            room = shard - self._waiting_tokens
            self._waiting.append({c: x[:room].to("cpu", self.dtype) for c, x in streams.items()})
            self._waiting_tokens += len(rows[:room])
            streams = {c: x[room:] for c, x in streams.items()}
            rows = rows[room:]
            if self._waiting_tokens == shard:
                self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        for site in self.sites:
            path = _shard_path(self.directory, site, len(self.shard_tokens))
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"activations": torch.cat([part[site] for part in self._waiting])}, path)
        self.shard_tokens.append(self._waiting_tokens)
        self._waiting, self._waiting_tokens = [], 0


@torch.inference_mode()
def harvest(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    sites: Iterable[int],
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_tokens: int | None = None,
    signal_tokens: SignalTokens = NOT_FIRST,
    outlier_ratio: float = 10.0,
    progress: Callable[[int], None] | None = None,
) -> ActivationStore:
    """Store the streams entering ``sites`` for all tokens that carry a signal, a forward a batch.

    The forward stops at the last layer needed; at most one shard per site is held in memory.

    Args:
        model: a causal language model; run in evaluation mode on its own device.
        batches: (input_ids [B, S], attention_mask [B, S]), padding on either side.
        sites: layers whose incoming streams are kept.
        directory: where the shards go.
        dtype: type to store.
        max_tokens: stop after so many stored tokens; None takes all.
        signal_tokens: which tokens are stored; by default all but each sequence's first.
        outlier_ratio: leave out tokens whose norm, at any of the sites, is above so many times the
            batch's median there (massive activations, which would dominate the squared error).
        progress: called with the number of tokens just stored.

    Returns:
        The store, opened.

    Raises:
        UserError: no token was left.
    """
    sites = tuple(sorted(set(sites)))
    device = next(model.parameters()).device
    writer = _ShardWriter(directory, sites, dtype)
    stored = without = outliers = width = 0
    was_training = model.training
    model.eval()
    try:
        for input_ids, attention_mask in batches:
            input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
            streams = residual_streams(model, input_ids, attention_mask, sites)
            real = attention_mask.bool()
            keep = signal_tokens(input_ids, real)
            rows = {site: stream[keep] for site, stream in streams.items()}
            usual = _usual_rows(rows.values(), outlier_ratio)
            room = None if max_tokens is None else max_tokens - stored
            rows = {site: stream[usual][:room] for site, stream in rows.items()}
            writer.add(rows)

            added, width = rows[sites[0]].shape
            stored += added
            without += int((real & ~keep).sum())
            outliers += int((~usual).sum())
            if progress is not None:
                progress(added)
            if stored == max_tokens:
                break
    finally:
        model.train(was_training)
    if not stored:
        raise UserError("no activations to store: the texts hold no token that carries a signal")
    writer.flush()
    contents = Harvest(
        width=width,
        dtype=str(dtype).removeprefix("torch."),
        sites=sites,
        shard_tokens=tuple(writer.shard_tokens),
        without_signal=without,
        outliers_dropped=outliers,
    )
    (directory / STORE_FILE).write_text(json.dumps(asdict(contents), indent=2) + "\n", "utf-8")
    return ActivationStore(directory)


class ActivationStore:
    """Harvested activations, read by site in an exact shuffle.

    Args:
        directory: what ``harvest`` wrote.

    Attributes:
        contents: width, sites, shards and counts.

    Raises:
        UserError: no complete store there.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / STORE_FILE
        if not path.is_file():
            raise UserError(f"no activations in {directory}: {STORE_FILE} is missing; harvest them")
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.contents = Harvest(
            **stored
            | {"sites": tuple(stored["sites"]), "shard_tokens": tuple(stored["shard_tokens"])}
        )
        self._directory = directory
        self._shards: dict[int, list[Tensor]] = {}
        self._order: tuple[tuple[int, int], Tensor] | None = None

    @property
    def width(self) -> int:
        """D."""
        return self.contents.width

    @property
    def sites(self) -> tuple[int, ...]:
        return self.contents.sites

    def tokens(self, site: int) -> int:
        """How many tokens are stored at ``site``."""
        self._check(site)
        return sum(self.contents.shard_tokens)

    def rows(self, site: int, positions: Tensor) -> Tensor:
        """Activations [T, D] of the tokens at ``positions`` [T], in storage order numbers."""
        shards = self._open(site)
        if len(shards) == 1:
            return shards[0][positions]
        ends = torch.tensor(list(accumulate(len(shard) for shard in shards)))
        shard_of = torch.searchsorted(ends, positions, right=True)
        out = shards[0].new_empty(len(positions), self.width)
        for index in shard_of.unique().tolist():
            here = shard_of == index
            shard = shards[index]
            out[here] = shard[positions[here] - (ends[index] - len(shard))]
        return out

    def batch(
        self,
        site: int,
        batch_size: int,
        *,
        seed: int,
        step: int,
        part: int = 0,
        parts: int = 1,
    ) -> Tensor:
        """Batch number ``step`` of an endless shuffled stream: a pure function of its arguments.

        Each pass over the store is a fresh permutation of all its tokens; a batch may span two.

        Args:
            site: whose activations.
            batch_size: tokens of the whole batch.
            seed: of the permutations.
            step: number of the batch.
            part, parts: only rows ``part``, ``part + parts``, ... of the batch are read.

        Returns:
            [batch_size / parts, D] in the stored type.
        """
        count = self.tokens(site)
        positions = torch.arange(step * batch_size + part, (step + 1) * batch_size, parts)
        passes = positions // count
        chosen = torch.cat(
            [
                self._permutation(seed, index)[positions[passes == index] % count]
                for index in passes.unique().tolist()
            ]
        )
        return self.rows(site, chosen.long())

    def _permutation(self, seed: int, index: int) -> Tensor:
        """The order of pass ``index``, int32 [tokens]; the last one is kept."""
        if self._order is None or self._order[0] != (seed, index):
            count = sum(self.contents.shard_tokens)
            # torch reads 32 bits of a seed: mix both numbers down to that many.
            mixed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(mixed)
            order = torch.randperm(count, generator=generator, dtype=torch.int32)
            self._order = ((seed, index), order)
        return self._order[1]

    def _open(self, site: int) -> list[Tensor]:
        """The site's shards: one tensor in memory if small, else mapped from their files."""
        self._check(site)
        if site not in self._shards:
            shards = [
                load_file(_shard_path(self._directory, site, index))["activations"]
                for index in range(len(self.contents.shard_tokens))
            ]
            small = sum(shard.nbytes for shard in shards) <= _MEMORY_BYTES
            self._shards[site] = [torch.cat(shards)] if small else shards
        return self._shards[site]

    def _check(self, site: int) -> None:
        if site not in self.sites:
            hint = nearest(str(site), self.sites)
            raise UserError(f"no activations of site {site} in {self._directory}; {hint}")


@dataclass(frozen=True)
class ActivationBatches:
    """Batches of one site's activations as a function of the step alone.

    Attributes:
        store: where they lie.
        site: whose.
        batch_size: tokens of the whole batch.
        seed: of their order.
        beside: another site, whose activations of the same tokens come with them, if not None.
    """

    store: ActivationStore
    site: int
    batch_size: int
    seed: int
    beside: int | None = None

    def __call__(self, step: int) -> Tensor:
        """[batch_size, D], or [batch_size, 2, D] with another site beside."""
        return self.part(step, 0, 1)

    def part(self, step: int, index: int, parts: int) -> Tensor:
        """[batch_size / parts, ...]: one of so many parts, the only one that is read."""
        found = [
            self.store.batch(
                site, self.batch_size, seed=self.seed, step=step, part=index, parts=parts
            )
            for site in (self.site, self.beside)
            if site is not None
        ]
        return found[0] if len(found) == 1 else torch.stack(found, 1)


def _usual_rows(streams: Iterable[Tensor], outlier_ratio: float) -> Tensor:
    """[T] bool: rows whose norm is within the ratio of the median norm in every [T, D] stream."""
    usual = []
    for stream in streams:
        norm = stream.float().norm(dim=1)
        usual.append(norm <= outlier_ratio * (norm.median() if len(norm) else 0))
    return torch.stack(usual).all(dim=0)


def _shard_path(directory: Path, site: int, index: int) -> Path:
    return directory / f"site_{site}" / f"shard_{index:05d}.safetensors"
