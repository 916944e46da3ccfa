"""What the geometry of deltas is, in figures: the record of stage ``geometry``.

E specialists, K dimensions of a subspace. A delta is what an adapter adds to the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.saes.geometry.likeness import Likeness


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Two honest dictionaries of the same data: an SAE of the stream, trained as those of deltas
    are, beside the base's SAE."""

    layer: int
    seed: int
    """Of the SAE and the order of its tokens."""
    likeness: Likeness
    """To the base's SAE."""
    unexplained: float
    """Of the stream, on held-out text."""


@dataclass(frozen=True, kw_only=True)
class Reconstructions:
    """Fractions of held-out deltas' variance that dictionaries leave unexplained, at equal L0."""

    base_raw: float
    """The base's SAE, given the delta as it is."""
    base_refitted: float
    """The same, given the delta at the stream's scale, its two biases fitted to deltas."""
    base_pursuit: float
    """Non-negative pursuit on its decoder: the dictionary's own limit."""
    random_pursuit: float
    """The same on random directions."""
    matched_pursuit: float
    """The same on directions with the deltas' covariance."""
    pca: float
    """As many principal components as a token has active latents."""
    pca_rank: float
    """As many as the adapter's rank."""


@dataclass(frozen=True, kw_only=True)
class Deltas:
    """One adapter's deltas at one layer, and their SAE."""

    method: str
    """Name of the method."""
    rank: int
    """R of the adapter, all its specialists together."""
    seed: int
    """Of the adapter."""
    layer: int
    """The stream that enters it."""
    kind: str
    """One of `KINDS`."""
    update_norm: float
    """|(alpha / R) B A|_F over all adapted modules."""
    stream_norm: float
    """Mean |delta| over mean |stream|."""
    stream_rank: float
    """Effective rank of the deltas."""
    module_rank: float
    """Mean effective rank of (alpha / R) B A x over the adapted modules below the layer."""
    alive: float
    """Share of the SAE's latents that are active on any held-out token."""
    unexplained: float
    """By the SAE, on held-out text."""
    likeness: Likeness
    """Of the SAE to the base's."""
    random: Likeness
    """Of as many random directions; its CKA is that of permuted tokens."""
    matched: Likeness
    """Of as many directions with the deltas' covariance; likewise."""
    reseeded: float | None = None
    """Alignment of two SAEs of these deltas; None: there is one."""
    reconstructions: Reconstructions | None = None
    """None where they were not made."""


KINDS = {
    "trained": "as it was trained, alpha = r",
    "equal_norm": "scaled to the mean norm of the ranks",
    "untrained": "random matrices of the same norm",
    "permuted": "the deltas' principal components, each in an order of its own",
}
"""{kind of deltas: what they are}."""


@dataclass(frozen=True, kw_only=True)
class Specialists:
    """The specialists of one routed adapter at one layer; matrices are [E, E]."""

    method: str
    seed: int
    """Of the adapter."""
    layer: int
    """The stream that enters it."""
    shared: list[list[float]]
    """Alignment of the dictionary of row e's deltas with that of column e's; on the diagonal, of
    two SAEs of the same deltas."""
    chance: list[list[float]]
    """Of directions with the covariance of row e's deltas, likewise."""
    crossed: list[list[float]]
    """Fraction of the variance of column e's deltas that row e's SAE leaves unexplained."""
    routed: list[list[float]]
    """Share of row e's deltas that lies in the span of the features that route to column e."""
    routed_random: list[list[float]]
    """The same of as many latents drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """All that the stage measured."""

    model: str
    fingerprint: str
    """Of the artifact."""
    latents: int
    """Of the SAEs."""
    k: int
    """Active latents of a token."""
    tokens: int
    """That SAEs were trained on."""
    held_out: int
    """That figures are of."""
    references: tuple[Reference, ...]
    deltas: tuple[Deltas, ...]
    specialists: tuple[Specialists, ...] = ()
