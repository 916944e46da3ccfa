"""The deltas of a study's adapters: of each as it was trained, and under every control.

Shapes: T tokens, D model width, E specialists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steerlora.data.batches import batches_by_length
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.steps import Context
from steerlora.errors import UserError
from steerlora.methods.base import LowRankUpdate, Method
from steerlora.methods.saving import load_adapter
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.geometry.directions import effective_rank, permuted_components
from steerlora.saes.topk import TopK
from steerlora.stages import adapter_training
from steerlora.stages.common import domain_names, load_base, read_rows, sae_rows
from steerlora.stages.geometry_streams import (
    TokenStreams,
    module_grams,
    scaled,
    specialist_alone,
    token_streams,
    untrained,
    update_norm,
    with_updates,
)
from steerlora.stages.sae_quality import TextBatch

if TYPE_CHECKING:
    from steerlora.stages.geometry import GeometrySettings

ROWS = 64
"""Rows of text in a forward."""


class Streams(NamedTuple):
    """Of one model."""

    fit: TokenStreams
    """Of the text that SAEs are trained on."""
    held_out: TokenStreams


class Routed(NamedTuple):
    """What routes an adapter's specialists."""

    gates: dict[int, Tensor]
    """{control site: weights of the specialists on held-out tokens, [T, E]}."""
    saes: Mapping[int, SparseAutoencoder]
    """{control site: the SAE whose features they follow}; none where no features do."""


@dataclass
class Found:
    """Deltas of one adapter at one layer, of mean norm sqrt(D), and what is known of them."""

    adapter: int
    """Its number in the study; of the stream itself, that of a seed."""
    kind: str
    """As in ``steerlora/saes/geometry/records.py``; "stream": the base's stream and no delta."""
    layer: int
    fit: Tensor
    """That SAEs are trained on, [T, D]."""
    held_out: Tensor
    """[T', D]."""
    scale: float
    """Factor that brought them to that norm."""
    specialist: int | None = None
    """That acted alone; None: all did."""
    update_norm: float = 0.0
    module_rank: float = 0.0
    copies: int = 1
    """SAEs of them, which differ by their seed."""
    saes: list[TopK] = field(default_factory=list)


def to_unit(rows: Tensor) -> float:
    """Factor that brings rows [T, D] to mean norm sqrt(D), as SAEs train on streams."""
    return rows.shape[1] ** 0.5 / max(float(rows.norm(dim=1).mean()), 1e-30)


class DeltaReader:
    """Runs the base with each adapter in turn.

    Args:
        context: of the stage.
        generator: of what controls draw.

    Raises:
        UserError: an adapter of another base, or one that adds nothing.

    Attributes:
        base: the base's own streams at all sites up to the last layer that is read.
        routed: {number of an adapter: what routes its specialists}, of those read so far.
    """

    def __init__(self, context: Context, generator: torch.Generator) -> None:
        settings: GeometrySettings = context.config
        self.settings, self.generator = settings, generator
        self._adapters = context.inputs["adapters"]
        self.model, tokenizer = load_base(
            context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
        )
        self.rule = signal_tokens_of(tokenizer)
        source, pad = context.inputs["domains"], tokenizer.pad_token_id
        fit = sae_rows(source, settings.domains, tokenizer, settings.max_length)
        held_out = []
        for name in domain_names(source):
            rows = read_rows(source / f"heldout/{name}.jsonl")
            held_out += encode_chats(tokenizer, rows, settings.max_length)
        self._fit = self._batches(fit, settings.tokens, pad)
        self._held_out = self._batches(held_out, settings.held_out, pad)
        self.base = self._streams(None, range(max(settings.layers) + 1))
        self.norms = [self._norm(artifact.path) for artifact in self._adapters]
        self.routed: dict[int, Routed] = {}

    def _batches(
        self, rows: Sequence[EncodedChat], tokens: int, pad_token_id: int
    ) -> list[TextBatch]:
        """Rows by chance until so many of their tokens carry a signal; all, if there are fewer."""
        chosen, count = [], 0
        for number in torch.randperm(len(rows), generator=self.generator).tolist():
            if count >= tokens:
                break
            ids = torch.tensor(rows[number].input_ids)[None]
            chosen.append(rows[number])
            count += int(self.rule(ids, torch.ones_like(ids)).sum())
        batches = batches_by_length(chosen, ROWS, pad_token_id)
        return [TextBatch(batch.input_ids, batch.attention_mask) for batch in batches]

    def _norm(self, path) -> float:
        method = load_adapter(self.model, path / adapter_training.FOLDER)
        norm = update_norm(method.low_rank())
        method.remove()
        if not norm:
            raise UserError(f"adapter {path} adds nothing to the base: train it for some steps")
        return norm

    def _streams(self, method: Method | None, sites: Sequence[int] | None = None) -> Streams:
        read = partial(
            token_streams,
            self.model,
            sites=self.settings.layers if sites is None else sites,
            rule=self.rule,
            method=method,
        )
        return Streams(read(batches=self._fit), read(batches=self._held_out))

    def deltas(self, number: int) -> Iterator[Found]:
        """An adapter's deltas of every kind at every layer, those of its specialists last."""
        facts = self.settings.adapters[number]
        method = load_adapter(self.model, self._adapters[number] / adapter_training.FOLDER)
        try:
            updates, norm = method.low_rank(), self.norms[number]
            streams, ranks = self._streams(method), self._module_ranks(method)
            trained = [*self._found(number, "trained", streams, ranks, update_norm=norm, copies=2)]
            yield from trained
            if facts.swept:
                common = self._common_norm(facts.seed)
                with with_updates(method, scaled(updates, common / norm)):
                    found = self._streams(method)
                yield from self._found(number, "equal_norm", found, ranks, update_norm=common)
            if facts.controlled:
                yield from map(self._permuted, trained)
                with with_updates(method, untrained(updates, self.generator)):
                    found, ranks = self._streams(method), self._module_ranks(method)
                yield from self._found(number, "untrained", found, ranks, update_norm=norm)
            if gates := streams.held_out.gates:
                self.routed[number] = Routed(gates, dict(method.saes))
                yield from self._specialists(number, method, updates)
        finally:
            method.remove()

    def _specialists(
        self, number: int, method: Method, updates: Mapping[str, LowRankUpdate]
    ) -> Iterator[Found]:
        count = next(iter(updates.values())).specialists
        for specialist in range(count if count > 1 else 0):
            with with_updates(method, specialist_alone(updates, specialist)):
                found = self._streams(method)
            own = {"specialist": specialist, "copies": 2}
            yield from self._found(number, "trained", found, {}, **own)

    def _common_norm(self, seed: int) -> float:
        """Mean norm of the updates of all ranks of a seed."""
        pairs = zip(self.norms, self.settings.adapters, strict=True)
        return mean(norm for norm, facts in pairs if facts.swept and facts.seed == seed)

    def _module_ranks(self, method: Method) -> dict[str, float]:
        grams = module_grams(method, self._held_out, self.rule)
        return {name: effective_rank(gram) for name, gram in grams.items()}

    def _found(
        self, number: int, kind: str, streams: Streams, ranks: Mapping[str, float], **about: Any
    ) -> Iterator[Found]:
        """The deltas of an adapted model at every layer."""
        for layer in self.settings.layers:
            fit, held_out = (
                after.streams[layer] - before.streams[layer]
                for before, after in zip(self.base, streams, strict=True)
            )
            scale = to_unit(fit)
            below = [rank for name, rank in ranks.items() if int(name.split(":")[0]) < layer]
            yield Found(
                number,
                kind,
                layer,
                fit * scale,
                held_out * scale,
                scale,
                module_rank=mean(below) if below else 0.0,
                **about,
            )

    def _permuted(self, found: Found) -> Found:
        """The same deltas with their principal components in orders of their own."""
        fit, held_out = (
            permuted_components(part, self.generator) for part in (found.fit, found.held_out)
        )
        return replace(found, kind="permuted", fit=fit, held_out=held_out, copies=1, saes=[])
