"""What stage ``geometry`` measures: SAEs of all deltas, trained at once, and the figures of each.

Shapes: T tokens, D model width, N latents, E specialists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerlora.engine.steps import Context
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.geometry.directions import (
    alignment,
    effective_rank,
    matched_directions,
    random_directions,
)
from steerlora.saes.geometry.likeness import Seen, chance, likeness, seen
from steerlora.saes.geometry.reconstruction import pca_unexplained, pursuit_unexplained, unexplained
from steerlora.saes.geometry.records import (
    Deltas,
    Geometry,
    Reconstructions,
    Reference,
    Specialists,
)
from steerlora.saes.geometry.specialists import Signal, specialists_of
from steerlora.saes.geometry.together import BIASES, TogetherSettings, train_together
from steerlora.saes.saelens import load_sae
from steerlora.saes.topk import TopK
from steerlora.stages import sae_training
from steerlora.stages.geometry_deltas import DeltaReader, Found, to_unit

if TYPE_CHECKING:
    from steerlora.stages.geometry import GeometrySettings

AT_ONCE = 32
"""SAEs that train at once."""
PURSUED = 500
"""Held-out tokens of which non-negative pursuit is measured."""
SIZES = (4, 16, 64)
"""K of the subspaces whose principal angles are measured."""


class Measures:
    """The measurements of one artifact.

    Args:
        context: of the stage.
    """

    def __init__(self, context: Context) -> None:
        self.settings: GeometrySettings = context.config
        self.fingerprint = context.fingerprint
        self.base_saes = {
            layer: load_sae(artifact / sae_training.FOLDER)
            for layer, artifact in zip(self.settings.layers, context.inputs["saes"], strict=True)
        }
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.reader = DeltaReader(context, self.generator)
        self.made = 0  # SAEs so far: each has a seed of its own

    def record(self, advance: Callable[..., None]) -> Geometry:
        """Everything, adapter by adapter and then layer by layer.

        Args:
            advance: told of each adapter and of each layer.
        """
        settings, base = self.settings, self.reader.base
        kept: dict[int, list[Found]] = {layer: [] for layer in settings.layers}
        for number, facts in enumerate(settings.adapters):
            for found in self.reader.deltas(number):
                kept[found.layer].append(found)
            advance(note=f"{facts.method} rank {facts.rank} seed {facts.seed}")
        references: list[Reference] = []
        deltas: list[Deltas] = []
        specialists: list[Specialists] = []
        for layer in settings.layers:
            stream = [part.streams[layer] for part in base]
            scale = to_unit(stream[0])
            seeds = sorted({facts.seed for facts in settings.adapters})
            own = [
                Found(number, "stream", layer, *(part * scale for part in stream), scale)
                for number in range(len(seeds))
            ]
            self._train([*own, *kept[layer]])
            read = seen(self.base_saes[layer], stream[1])
            for seed, one in zip(seeds, own, strict=True):
                near = likeness(seen(one.saes[0], one.held_out), read, SIZES)
                left = _by_sae(one.saes[0], one.held_out)
                references.append(
                    Reference(layer=layer, seed=seed, likeness=near, unexplained=left)
                )
            whole = [one for one in kept[layer] if one.specialist is None]
            deltas += [self._deltas(one, read, scale) for one in whole]
            specialists += self._specialists(layer, kept[layer])
            advance(note=f"layer {layer}")
        return Geometry(
            model=settings.model,
            fingerprint=self.fingerprint,
            latents=settings.latents,
            k=settings.k,
            tokens=len(base.fit.streams[layer]),
            held_out=len(base.held_out.streams[layer]),
            references=tuple(references),
            deltas=tuple(deltas),
            specialists=tuple(specialists),
        )

    def _specialists(self, layer: int, found: Sequence[Found]) -> Iterator[Specialists]:
        """Of every adapter that has some."""
        alone = [one for one in found if one.specialist is not None]
        for number, group in groupby(alone, key=lambda one: one.adapter):
            parts, facts = list(group), self.settings.adapters[number]
            yield specialists_of(
                [one.fit for one in parts],
                [one.held_out for one in parts],
                [one.saes for one in parts],
                self._signal(number, layer),
                method=facts.method,
                seed=facts.seed,
                layer=layer,
                generator=self.generator,
            )

    def _signal(self, number: int, layer: int) -> Signal | None:
        """Of the last control site below a layer; None where no features route."""
        gates, saes = self.reader.routed[number]
        site = max(site for site in gates if site < layer)
        if site not in saes:
            return None
        features = saes[site].encode(self.reader.base.held_out.streams[site])
        dense = features.dense(saes[site].latents)
        return Signal(gates[site], dense, saes[site].W_dec.detach())

    def _train(self, jobs: Sequence[Found]) -> None:
        """SAEs of all of them, some at a time."""
        settings = self.settings
        made: list[tuple[TopK, Tensor, int]] = []
        for job in jobs:
            for _ in range(job.copies):
                self.made += 1
                # Seeds of its own: SAEs that begin alike would end alike.
                seed = 100_000 * (settings.seed + 1) + self.made
                sae = TopK(
                    job.fit.shape[1], settings.latents, k=settings.k, auxiliary=0.0, seed=seed
                )
                sae.center_on(job.fit[: settings.batch_size])
                job.saes.append(sae)
                made.append((sae, job.fit, seed))
        course = TogetherSettings(steps=settings.steps, batch_size=settings.batch_size)
        for start in range(0, len(made), AT_ONCE):
            train_together(*zip(*made[start : start + AT_ONCE], strict=True), course)

    def _deltas(self, one: Found, read: Seen, scale: float) -> Deltas:
        """The figures of an adapter's deltas at a layer.

        Args:
            one: with its SAEs.
            read: the base's SAE on the stream.
            scale: factor that brings the stream to mean norm sqrt(D).
        """
        facts, sae = self.settings.adapters[one.adapter], one.saes[0]
        own = seen(sae, one.held_out)
        return Deltas(
            method=facts.method,
            rank=facts.rank,
            seed=facts.seed,
            layer=one.layer,
            kind=one.kind,
            update_norm=one.update_norm,
            stream_norm=scale / one.scale,
            stream_rank=effective_rank(one.held_out.t() @ one.held_out),
            module_rank=one.module_rank,
            alive=own.alive,
            unexplained=_by_sae(sae, one.held_out),
            likeness=likeness(own, read, SIZES),
            random=chance(own, read, SIZES, self.generator),
            matched=chance(own, read, SIZES, self.generator, one.held_out),
            reseeded=_reseeded(one),
            reconstructions=self._reconstructions(one, scale) if one.kind == "trained" else None,
        )

    def _reconstructions(self, one: Found, scale: float) -> Reconstructions:
        settings, base = self.settings, self.base_saes[one.layer]
        k, bias, few = settings.k, one.fit.mean(0), one.held_out[:PURSUED]
        directions = base.W_dec.detach().float()
        count, width = directions.shape
        raw = one.held_out / one.scale
        pursued = partial(pursuit_unexplained, few, bias=bias, k=k)
        refitted = TopK(width, count, k=k, auxiliary=0.0)
        with torch.no_grad():
            refitted.W_enc.copy_(base.W_enc)
            refitted.W_dec.copy_(base.W_dec)
            refitted.b_enc.copy_(base.b_enc * scale)
            refitted.b_dec.copy_(bias)
        course = TogetherSettings(
            steps=settings.steps, batch_size=settings.batch_size, trained=BIASES
        )
        train_together([refitted], [one.fit], [settings.seed], course)
        return Reconstructions(
            base_raw=_by_sae(base, raw),
            base_refitted=_by_sae(refitted, one.held_out),
            base_pursuit=pursued(dictionary=directions),
            random_pursuit=pursued(dictionary=random_directions(count, width, self.generator)),
            matched_pursuit=pursued(dictionary=matched_directions(count, one.fit, self.generator)),
            pca=pca_unexplained(one.fit, one.held_out, min(k, width)),
            pca_rank=pca_unexplained(
                one.fit, one.held_out, min(settings.adapters[one.adapter].rank, width)
            ),
        )


@torch.no_grad()
def _by_sae(sae: SparseAutoencoder, x: Tensor) -> float:
    return unexplained(x, sae(x))


def _reseeded(one: Found) -> float | None:
    """Alignment of the two SAEs of the same deltas."""
    if len(one.saes) < 2:
        return None
    first, second = (seen(sae, one.held_out) for sae in one.saes)
    return float(alignment(first.rows, second.rows).mean())
