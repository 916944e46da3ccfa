"""Harvesting: the streams of text at several sites in one forward, each into a store of its own.

Shapes: B batch, S sequence, T tokens, D model width. A *site* c names the stream entering layer c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from steerlora.data.activations import (
    ACTIVATIONS,
    NORMS,
    STORE_FILE,
    ActivationStore,
    Harvest,
    finite_norms,
    shard_path,
)
from steerlora.engine.manifests import write_json
from steerlora.errors import UserError
from steerlora.lm.decoder import residual_streams
from steerlora.lm.signal_tokens import NOT_FIRST, SignalTokens

HARVEST_ROWS = 64
"""Rows that a harvest runs at once."""
_SHARD_BYTES = 2**26


class _ShardWriter:
    """Collects tokens of all sites and writes them in shards of equal size.

    Shards that an interrupted harvest has written at every site are kept: the first ``resumed``
    tokens are there.
    """

    def __init__(self, stores: Mapping[int, Path], width: int, dtype: torch.dtype) -> None:
        self.stores, self.width, self.dtype = stores, width, dtype
        self.shard = max(1, _SHARD_BYTES // (width * dtype.itemsize))
        kept = min(map(self._whole_shards, stores.values()))
        self.shard_tokens = [self.shard] * kept
        self.resumed = kept * self.shard
        self._waiting: list[dict[int, Tensor]] = []
        self._waiting_tokens = 0

    def add(self, streams: Mapping[int, Tensor]) -> None:
        """streams: {site: [t, D]}, the same t at every site."""
        while rows := len(next(iter(streams.values()))):
            room = self.shard - self._waiting_tokens
            self._waiting.append({c: x[:room].to("cpu", self.dtype) for c, x in streams.items()})
            self._waiting_tokens += min(rows, room)
            streams = {c: x[room:] for c, x in streams.items()}
            if self._waiting_tokens == self.shard:
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        for site, folder in self.stores.items():
            rows = torch.cat([part[site] for part in self._waiting])
            norms = finite_norms(rows, site)
            path = shard_path(folder, len(self.shard_tokens))
            unfinished = path.with_name(f".{path.name}.tmp")
            save_file({ACTIVATIONS: rows, NORMS: norms}, unfinished)
            unfinished.replace(path)
        self.shard_tokens.append(self._waiting_tokens)
        self._waiting, self._waiting_tokens = [], 0

    def _whole_shards(self, folder: Path) -> int:
        """How many of the first shards are there and whole."""
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        while (path := shard_path(folder, count)).is_file():
            try:
                with safe_open(path, "pt") as file:
                    rows = file.get_slice(ACTIVATIONS)
                    if rows.get_shape() != [self.shard, self.width]:
                        break
            except (SafetensorError, OSError):
                break
            count += 1
        return count


@torch.inference_mode()
def harvest(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    stores: Mapping[int, Path],
    *,
    max_tokens: int | None = None,
    signal_tokens: SignalTokens = NOT_FIRST,
    progress: Callable[[int], None] | None = None,
) -> dict[int, ActivationStore]:
    """Store the streams of all tokens that carry a signal, a forward a batch for all sites.

    The forward stops at the last layer needed; at most one shard per site is held in memory. Token
    t is the same token at every site, whichever sites are harvested together. What an interrupted
    harvest of the same text has written is kept: its tokens are counted, and not run again.

    Args:
        model: a causal language model; run in evaluation mode on its own device. Its own type is
            stored.
        batches: (input_ids [B, S], attention_mask [B, S]), padding on either side.
        stores: {site: the folder of its store}.
        max_tokens: stop after so many tokens; None takes all.
        signal_tokens: which tokens are stored; by default all but each sequence's first.
        progress: called with the number of tokens just stored.

    Returns:
        {site: its store, opened}.

    Raises:
        UserError: no token was left, or a stream that is not finite.
    """
    sites = sorted(stores)
    weight = next(model.parameters())
    writer: _ShardWriter | None = None
    seen = without = 0
    was_training = model.training
    model.eval()
    try:
        for input_ids, attention_mask in batches:
            if seen == max_tokens:
                break
            input_ids, real = input_ids.to(weight.device), attention_mask.to(weight.device)
            keep = signal_tokens(input_ids, real)
            count = int(keep.sum())
            wanted = count if max_tokens is None else min(count, max_tokens - seen)
            streams = None
            if writer is None or seen + wanted > writer.resumed:
                streams = residual_streams(model, input_ids, real, sites)
            if writer is None:
                writer = _ShardWriter(stores, streams[sites[0]].shape[-1], streams[sites[0]].dtype)
            stored = max(0, writer.resumed - seen)
            if stored < wanted:
                writer.add({site: streams[site][keep][stored:wanted] for site in sites})
            seen += wanted
            without += int((real.bool() & ~keep).sum())
            if progress is not None:
                progress(wanted)
    finally:
        model.train(was_training)
    if not seen:
        raise UserError("no activations to store: the texts hold no token that carries a signal")
    writer.flush()
    dtype = str(writer.dtype).removeprefix("torch.")
    for site, folder in stores.items():
        contents = Harvest(
            site=site,
            width=writer.width,
            dtype=dtype,
            shard_tokens=tuple(writer.shard_tokens),
            without_signal=without,
        )
        write_json(folder / STORE_FILE, contents)
    return {site: ActivationStore(stores[site]) for site in sites}
