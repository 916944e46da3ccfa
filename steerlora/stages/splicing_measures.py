"""A model in every way of splicing: its losses, its streams and the SAEs' features, row by row.

B batch, S sequence, T tokens that carry a signal, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerlora.data.batches import ChatBatch
from steerlora.evaluation.splicing import (
    ADAPTER,
    BASE,
    METHOD,
    SAES,
    WAYS,
    Latents,
    RowLosses,
    Stream,
)
from steerlora.lm.decoder import edited, hidden_states, layers_of
from steerlora.lm.divergence import output_logits
from steerlora.methods.base import Method


@contextmanager
def running(method: Method, way: str) -> Iterator[None]:
    """The model in one of the `WAYS`, inside this context."""
    contexts: dict[str, AbstractContextManager] = {
        BASE: method.disabled(),
        SAES: method.only("saes"),
        METHOD: nullcontext(),
        ADAPTER: method.only("adapter"),
    }
    with contexts[way]:
        yield


class Found(NamedTuple):
    """What :class:`Measurement` gives, under a record's names."""

    tokens: list[int]
    losses: dict[str, RowLosses]
    streams: dict[str, dict[int, Stream]]
    latents: dict[str, dict[int, Latents]]


class Measurement:
    """Losses, streams and features of a model in every way, over batches of rows.

    Args:
        model: the base.
        method: attached to it.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.model, self.method = model, method
        self.layers = range(min(method.config.sites), len(layers_of(model)) + 1)
        self._rows: dict[str, dict[int, tuple[float, float]]] = {way: {} for way in WAYS}
        self._tokens: dict[int, int] = {}
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._fired: dict[tuple[str, int], Tensor] = {}
        self._counted = 0

    def add(self, indices: Sequence[int], batch: ChatBatch) -> None:
        """Add rows, which have these numbers."""
        ids, mask = batch.input_ids, batch.attention_mask
        real, kept = mask.bool(), self.method.signal_tokens(ids, mask)
        counted, targets = real[:, :-1] & real[:, 1:], ids[:, 1:]
        own, scores = {}, {}
        for way in WAYS:
            streams: dict[int, Tensor] = {}
            record = {layer: _recorder(streams, layer) for layer in self.layers}
            with running(self.method, way), edited(self.model, record):
                hidden = hidden_states(self.model, ids, mask)
            scores[way] = output_logits(self.model, hidden[:, :-1]).log_softmax(-1)
            own[way] = {layer: stream[kept] for layer, stream in streams.items()}
            self._add_losses(way, indices, scores[way], scores[BASE], counted, targets)
        self._tokens |= dict(zip(indices, counted.sum(1).tolist(), strict=True))
        self._counted += int(kept.sum())
        for way in (SAES, METHOD):
            for layer in self.layers:
                self._add_stream(way, layer, own[way][layer], own[BASE][layer])
            for site, sae in self.method.saes.items():
                features = sae.encode(own[way][site].to(sae.W_dec.device))
                fired = sae.times_fired(features).double()
                self._fired[way, site] = self._fired.get((way, site), 0) + fired

    def _add_losses(
        self,
        way: str,
        indices: Sequence[int],
        scores: Tensor,
        base: Tensor,
        counted: Tensor,
        targets: Tensor,
    ) -> None:
        nats = -scores.gather(-1, targets[..., None]).squeeze(-1).double()
        kl = (base.exp() * (base - scores)).sum(-1).double()
        sums = [(part * counted).sum(1).tolist() for part in (nats, kl)]
        self._rows[way] |= dict(zip(indices, zip(*sums, strict=True), strict=True))

    def _add_stream(self, way: str, layer: int, x: Tensor, base: Tensor) -> None:
        x, base = x.double(), base.double()
        sums = torch.stack(
            [
                (x - base).norm(dim=1).sum(),
                base.norm(dim=1).sum(),
                torch.cosine_similarity(x, base, dim=1).sum(),
            ]
        )
        self._sums[way, layer] = self._sums.get((way, layer), 0) + sums

    def result(self) -> Found:
        """Over all rows that were added."""
        order = sorted(self._tokens)
        losses = {
            way: RowLosses(
                cross_entropy=[rows[i][0] for i in order], kl=[rows[i][1] for i in order]
            )
            for way, rows in self._rows.items()
        }
        streams: dict[str, dict[int, Stream]] = {SAES: {}, METHOD: {}}
        for (way, layer), sums in self._sums.items():
            away, norm, cosine = sums.tolist()
            streams[way][layer] = Stream(distance=away / norm, cosine=cosine / self._counted)
        latents: dict[str, dict[int, Latents]] = {SAES: {}, METHOD: {}}
        for (way, site), fired in self._fired.items():
            alive = float((fired > 0).double().mean())
            latents[way][site] = Latents(l0=float(fired.sum()) / self._counted, alive=alive)
        return Found([self._tokens[i] for i in order], losses, streams, latents)


def _recorder(streams: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    def record(stream: Tensor) -> Tensor:
        streams[layer] = stream
        return stream

    return record
