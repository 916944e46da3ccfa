"""Where latents of an SAE are active in text, gathered batch by batch in bounded memory.

Shapes: B batch, S sequence, T tokens, K active latents per token, C chosen latents, N latents, V
vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerlora.reporting.dashboards import BINS, ContextShown, LatentShown, LogitEffect
from steerlora.saes.sparse import SparseFeatures

BEFORE, AFTER = 16, 6
"""Tokens shown around the one at which a latent is active."""
EFFECTS = 8
"""Tokens shown whose logits a latent raises, and as many that it lowers."""


class Batch(NamedTuple):
    """Features of a batch's tokens [T, K], where they stand ([T] row and position), and the ids."""

    features: SparseFeatures
    row: Tensor
    position: Tensor
    input_ids: Tensor
    """[B, S]."""
    lengths: Tensor
    """[B] real tokens."""


class _Found(NamedTuple):
    """A context, in the order of heaps: by value, then by the order of finding."""

    value: float
    number: int
    source: str
    ids: list[int]
    activations: list[float]
    marked: int


@dataclass
class Seen:
    """What chosen latents were seen to do, batch by batch.

    Attributes:
        latents: C numbers.
        total: N.
        contexts: kept of each.
        tokens: {domain: tokens seen}.
    """

    latents: list[int]
    total: int
    contexts: int
    tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._values: list[dict[str, list[Tensor]]] = [{} for _ in self.latents]
        self._best: list[list[_Found]] = [[] for _ in self.latents]
        self._count = 0

    def update(self, source: str, batch: Batch) -> None:
        """Add a batch of a domain's text, right-padded."""
        self.tokens[source] = self.tokens.get(source, 0) + len(batch.row)
        chosen = len(self.latents)
        columns = torch.full((self.total,), chosen)
        columns[self.latents] = torch.arange(chosen)
        places = columns.to(batch.row.device)[batch.features.indices]
        active = batch.features.values.new_zeros(len(batch.row), chosen + 1)
        active.scatter_add_(1, places, batch.features.values)
        grid = active.new_zeros(*batch.input_ids.shape, chosen)
        grid[batch.row, batch.position] = active[:, :chosen]
        grid, ids, lengths = grid.cpu(), batch.input_ids.cpu(), batch.lengths.tolist()
        for place in range(chosen):
            values = grid[..., place]
            self._values[place].setdefault(source, []).append(values[values > 0])
            largest, position = values.max(1)
            for row in largest.topk(min(self.contexts, len(largest))).indices.tolist():
                if largest[row] > 0:
                    self._keep(
                        place, source, ids[row, : lengths[row]], values[row], int(position[row])
                    )

    def _keep(self, place: int, source: str, ids: Tensor, values: Tensor, position: int) -> None:
        start, stop = max(0, position - BEFORE), min(len(ids), position + AFTER + 1)
        self._count += 1
        found = _Found(
            float(values[position]),
            -self._count,  # of equal ones the earlier stays
            source,
            ids[start:stop].tolist(),
            values[start:stop].tolist(),
            position - start,
        )
        keep = heapq.heappush if len(self._best[place]) < self.contexts else heapq.heappushpop
        keep(self._best[place], found)

    def latent(self, number: int, domain: str, tokenizer: Any, effects: Tensor) -> LatentShown:
        """One of the latents.

        Args:
            number: of the latent.
            domain: whose own it is, or nothing.
            tokenizer: reads ids.
            effects: [V] on logits.
        """
        place = self.latents.index(number)
        by_source = {name: torch.cat(parts) for name, parts in self._values[place].items()}
        values = torch.cat(list(by_source.values())).float()
        largest = float(values.max()) if len(values) else 0.0
        counts = torch.histc(values, BINS, 0.0, largest) if len(values) else torch.zeros(BINS)
        rising = effects[: len(tokenizer)].topk(min(EFFECTS, len(tokenizer)))
        falling = (-effects[: len(tokenizer)]).topk(min(EFFECTS, len(tokenizer)))
        return LatentShown(
            latent=number,
            domain=domain,
            density=len(values) / sum(self.tokens.values()),
            density_by_domain={
                name: len(own) / self.tokens[name] for name, own in by_source.items()
            },
            largest=largest,
            histogram=tuple(map(int, counts.tolist())),
            contexts=tuple(
                ContextShown(
                    value=found.value,
                    source=found.source,
                    tokens=tuple(pieces(tokenizer, found.ids)),
                    activations=tuple(found.activations),
                    marked=found.marked,
                )
                for found in sorted(self._best[place], reverse=True)
            ),
            promoted=_effects(tokenizer, rising.indices, rising.values),
            suppressed=_effects(tokenizer, falling.indices, -falling.values),
        )


def _effects(tokenizer: Any, ids: Tensor, values: Tensor) -> tuple[LogitEffect, ...]:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(LogitEffect(token=tokenizer.decode([i]), effect=value) for i, value in pairs)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token within the whole: a character of several tokens is the last one's."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
            continue
        found.append(now[len(before) :])
        before = now
    return found
