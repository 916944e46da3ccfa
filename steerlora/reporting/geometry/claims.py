"""Claims on the geometry of LoRA's deltas (arXiv 2605.28896), each beside chance, and two of ours.

A replicate is an adapter. Likeness is told on a scale of our own: 0, as like as two SAEs of one
stream are; 1, as unlike as directions that know only the deltas' covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from steerlora.evaluation.statistics import Interval, equivalence, t_interval
from steerlora.reporting.claims import Claim, judged_claim, without_verdicts
from steerlora.reporting.effects import Measure
from steerlora.reporting.geometry.quantities import (
    changes,
    layers_of,
    off_diagonal,
    on_diagonal,
    permutation_p,
    reference_of,
    slopes,
    subspace_size,
    swept,
)
from steerlora.reporting.tables import interval_text, number
from steerlora.reporting.verdicts import LEAST_SHARE, overlaps
from steerlora.saes.geometry.likeness import Likeness
from steerlora.saes.geometry.records import Geometry

RULE = (
    "Each effect has a direction, which the claim says is positive. The smallest effect that "
    f"counts is {LEAST_SHARE} of the one that the paper's figure implies, or where we do not know "
    "a figure, of the size that the claim's definition names. Where a claim has several measures, "
    "all must satisfy it. A replicate is an adapter: intervals are Student's t over adapters on "
    "one base and its SAEs. Again is the probability that another study of the same size would "
    "decide alike. Whether a figure stands above chance is said beside every verdict: a claim that "
    "something is far apart holds for random directions too."
)
BETTER = 0.2
"""Share of the error that G4 would have delta SAEs spare, the figure not being known."""
DENSER = 0.1
"""Share of the latents that G5 would have come alive with a doubling of the rank, or from the first
layer to the last; likewise."""
COSINE_MARGIN, ANGLE_MARGIN = 0.02, 3.0
"""Within which G6 takes an alignment, and a mean angle in degrees, to be stable over ranks."""
ALIGNED = 0.05
"""Share of a specialist's deltas that G8 would have in its own features' span beyond others'."""


def geometry_claims(record: Geometry, *, meaningful: bool = True) -> tuple[Claim, ...]:
    """G1 to G6 of the paper, G7 and G8 of ours.

    Args:
        record: what was measured.
        meaningful: False for a smoke run, which has figures and no verdicts.
    """
    claims = (
        _far(
            record,
            "G1",
            "Decoder directions of delta SAEs align weakly with the base's dictionary",
            "cosine 0.07; random directions of that size: 0.066",
            "largest cosine of a direction with any of the base's SAE",
            lambda found: found.alignment,
            figure=True,
        ),
        _far(
            record,
            "G2",
            "Their subspaces are far apart",
            "74 degrees; random subspaces of that size: 70 to 81",
            f"mean principal angle of the subspaces of {subspace_size(record)} dimensions in which "
            "the two dictionaries are longest, in degrees",
            lambda found: found.angles[subspace_size(record)],
            figure=True,
        ),
        _far(
            record,
            "G3",
            "Their activations are dissimilar",
            "low, figure not known to us",
            "centred linear CKA of the features of the same tokens (chance: tokens permuted)",
            lambda found: found.cka,
            figure=False,
        ),
        _reconstruction(record),
        _density(record),
        _stable(record),
        _shared(record),
        _written(record),
    )
    return claims if meaningful else without_verdicts(claims)


def _measure(
    record: Geometry,
    label: str,
    numerator: Iterable[float],
    denominator: Iterable[float] | None = None,
) -> Measure:
    """One number an adapter."""
    above = tuple(map(float, numerator))
    return Measure(
        label=label,
        seeds=tuple(range(len(above))),
        numerator=above,
        denominator=None if denominator is None else tuple(map(float, denominator)),
        item_errors=(0.0,) * len(above),
        items=0,
        fingerprints=(record.fingerprint,),
    )


def _claim(*said: Any, smallest: float, counts_from: str | None = None, **judged: Any) -> Claim:
    counts_from = counts_from or number(LEAST_SHARE * smallest, 3, sign=True)
    return judged_claim(*said, smallest=smallest, counts_from=counts_from, rule=RULE, **judged)


def _far(
    record: Geometry,
    id: str,
    text: str,
    paper: str,
    what: str,
    value: Callable[[Likeness], float],
    *,
    figure: bool,
) -> Claim:
    """A claim that delta SAEs are unlike the base's; ``figure``: the paper's is one of chance."""
    measures, notes = [], []
    for layer in layers_of(record):
        found = swept(record, layer)
        own, null, alike = (
            np.array([value(one) for one in side])
            for side in (
                [d.likeness for d in found],
                [d.matched for d in found],
                [reference_of(record, d).likeness for d in found],
            )
        )
        sign = 1 if alike.mean() > null.mean() else -1  # angles grow with distance
        measures.append(
            _measure(record, f"layer {layer}", sign * (alike - own), sign * (alike - null))
        )
        random = np.mean([value(d.random) for d in found])
        excess = t_interval(sign * (own - null))
        above = "above chance" if excess.low > 0 else "below it" if excess.high < 0 else "at chance"
        means = (own.mean(), null.mean(), random, alike.mean())
        shown = [number(float(mean), 3) for mean in means]
        notes.append(
            f"Layer {layer}: {shown[0]}; with the deltas' covariance alone {shown[1]}, at random "
            f"{shown[2]}, two SAEs of the stream {shown[3]}; nearer than chance by "
            f"{interval_text(excess, 3, sign=True)}: {above}."
        )
    return _claim(
        id,
        text,
        paper,
        f"{what[0].upper()}{what[1:]}, mean over latents, on the scale from 0 (two SAEs of the "
        "same stream) to 1 (directions that know the deltas' covariance alone). The paper's figure "
        "is 1 on this scale." + ("" if figure else " We do not know the paper's figure."),
        measures,
        unit="distance",
        smallest=1.0,
        agrees=figure and all(overlaps(m.interval, 1.0, math.inf) for m in measures),
        note=" ".join(notes),
    )


def _reconstruction(record: Geometry) -> Claim:
    measures, notes = [], []
    for layer in layers_of(record):
        found = swept(record, layer)
        made = [d.reconstructions for d in found]
        for label, name in (
            ("raw", "base_raw"),
            ("refitted", "base_refitted"),
            ("its own limit", "base_pursuit"),
        ):
            rival = np.array([getattr(one, name) for one in made])
            own = np.array([d.unexplained for d in found])
            measures.append(_measure(record, f"layer {layer}, {label}", rival - own, rival))
        permuted = [d.unexplained for d in swept(record, layer, "permuted")]
        parts = {
            "the delta SAE": np.mean([d.unexplained for d in found]),
            "PCA of equal L0": np.mean([one.pca for one in made]),
            "pursuit on random directions": np.mean([one.random_pursuit for one in made]),
            "on directions with the deltas' covariance": np.mean(
                [one.matched_pursuit for one in made]
            ),
        }
        if permuted:
            parts["an SAE of permuted deltas"] = np.mean(permuted)
        shown = ", ".join(f"{name} {number(float(mean), 3)}" for name, mean in parts.items())
        notes.append(f"Unexplained at layer {layer}: {shown}.")
    return _claim(
        "G4",
        "Delta SAEs reconstruct deltas better than the base's SAE",
        "better, figure not known to us",
        "Share of the base dictionary's error that the delta SAE spares, at equal L0 on held-out "
        "text: given the delta as it is, at the stream's scale with refitted biases, and by "
        f"non-negative pursuit on its decoder, its own limit. Size: {BETTER} of the error.",
        measures,
        unit="share",
        smallest=BETTER,
        note=" ".join(notes),
    )


def _density(record: Geometry) -> Claim:
    layers = layers_of(record)
    measures = []
    for layer in layers:
        if found := slopes(swept(record, layer), lambda d: d.alive):
            measures.append(_measure(record, f"a doubling of the rank, layer {layer}", found))
    if len(layers) > 1:
        first, last = (swept(record, layer) for layer in (layers[0], layers[-1]))
        deeper = [b.alive - a.alive for a, b in zip(first, last, strict=True)]
        measures.append(_measure(record, f"layer {layers[-1]} less layer {layers[0]}", deeper))
    return _claim(
        "G5",
        "Feature density rises with rank and with depth",
        "rises, figure not known to us",
        "Share of the delta SAE's latents that are active on any held-out token; L0 is held equal. "
        "Its slope over doublings of the rank within a seed, and the last layer less the first "
        f"within an adapter. Size: {DENSER} of the latents.",
        measures,
        unit="share",
        smallest=DENSER,
    )


def _stable(record: Geometry) -> Claim:
    measures, direction, notes = [], [], []
    size = subspace_size(record)
    for kind, says in (("trained", "alpha = r"), ("equal_norm", "equal norm")):
        for layer in layers_of(record):
            found = swept(record, layer, kind)
            for name, margin, value in (
                ("cosine", COSINE_MARGIN, lambda d: d.likeness.alignment),
                ("degrees", ANGLE_MARGIN, lambda d: d.likeness.angles[size]),
            ):
                moved = changes(found, value)
                if not moved:
                    continue
                measure = _measure(record, f"layer {layer}, {says}, {name}", moved)
                value_, low, high, seeds, items = measure.interval
                direction += [
                    Interval(margin - value_, margin - high, margin - low, seeds, items),
                    Interval(margin + value_, margin + low, margin + high, seeds, items),
                ]
                measures.append(measure)
                p = number(equivalence(moved, margin), 3)
                notes.append(f"{measure.label}: p {p} within ±{margin:g}.")
    return _claim(
        "G6",
        "The divergence is stable across ranks",
        "relatively stable; so is chance",
        "From the lowest rank to the highest within a seed, change of the mean largest cosine with "
        "the base's dictionary and of the mean principal angle. Two one-sided tests: every "
        f"interval lies within ±{COSINE_MARGIN} and ±{ANGLE_MARGIN:g} degrees; at alpha = r and at "
        "equal norm.",
        measures,
        unit="change",
        smallest=0.0,
        counts_from=f"within ±{COSINE_MARGIN}, ±{ANGLE_MARGIN:g}°",
        agrees=True,
        direction=direction,
        note=" ".join(notes),
    )


def _shared(record: Geometry) -> Claim:
    measures = []
    for layer in layers_of(record):
        found = [s for s in record.specialists if s.layer == layer]
        if found:
            above = [off_diagonal(s.shared) - off_diagonal(s.chance) for s in found]
            below = [on_diagonal(s.shared) - on_diagonal(s.chance) for s in found]
            measures.append(_measure(record, f"layer {layer}", above, below))
    return _claim(
        "G7",
        "Ours: the deltas of one adapter's specialists share a dictionary",
        "no paper's",
        "Alignment of the dictionaries of two specialists' deltas beyond that of directions with "
        "the deltas' covariance, as a share of the alignment beyond chance of two SAEs of the same "
        "specialist's: 1, the same dictionary; 0, chance.",
        measures,
        unit="share",
        smallest=1.0,
        agrees=all(overlaps(m.interval, 1.0, math.inf) for m in measures),
    )


def _written(record: Geometry) -> Claim:
    measures, notes = [], []
    for layer in layers_of(record):
        found = [s for s in record.specialists if s.layer == layer and s.routed]
        if found:
            own = [on_diagonal(s.routed) - off_diagonal(s.routed) for s in found]
            measures.append(_measure(record, f"layer {layer}", own))
            p = permutation_p([s.routed for s in found])
            shares = [
                np.mean([side(s.routed) for s in found]) for side in (on_diagonal, off_diagonal)
            ]
            random = np.mean([np.mean(s.routed_random) for s in found])
            shown = [number(float(share), 3) for share in (*shares, random)]
            notes.append(
                f"Layer {layer}: {shown[0]} in its own features' span, {shown[1]} in other "
                f"specialists', {shown[2]} in random ones'; specialists permuted, p {number(p, 4)}."
            )
    return _claim(
        "G8",
        "Ours: a specialist writes along the SAE features that route to it",
        "no paper's",
        "Share of a specialist's deltas that lies in the span of the decoder rows of the latents "
        "that go along with its gate most, less the same of other specialists' latents. Size: "
        f"{ALIGNED} of the deltas.",
        measures,
        unit="share",
        smallest=ALIGNED,
        agrees=True,
        note=" ".join(notes),
    )
