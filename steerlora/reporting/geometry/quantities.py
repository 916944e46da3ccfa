"""What the report on geometry takes from its record: which deltas, and one number an adapter.

E specialists, K dimensions of a subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from steerlora.saes.geometry.records import Deltas, Geometry, Reference

SIZE = 16
"""K of the subspaces of G2, or the largest below."""
PERMUTATIONS = 10_000


def swept(record: Geometry, layer: int, kind: str = "trained") -> list[Deltas]:
    """Deltas of the swept ranks at a layer, by rank and seed; of all adapters where none are."""
    own = [d for d in record.deltas if d.layer == layer and d.kind == kind]
    ranks = {(d.method, d.rank) for d in record.deltas if d.kind == "equal_norm"}
    chosen = [d for d in own if not ranks or (d.method, d.rank) in ranks]
    return sorted(chosen, key=lambda d: (d.rank, d.seed))


def layers_of(record: Geometry) -> list[int]:
    return sorted({d.layer for d in record.deltas})


def reference_of(record: Geometry, deltas: Deltas) -> Reference:
    """Two SAEs of the stream at the layer of these deltas, with their seed."""
    return next(
        one for one in record.references if (one.layer, one.seed) == (deltas.layer, deltas.seed)
    )


def subspace_size(record: Geometry) -> int:
    """K of the subspaces that the report is about."""
    sizes = set.intersection(*({*d.likeness.angles} for d in record.deltas))
    return max([k for k in sizes if k <= SIZE], default=min(sizes))


def slopes(found: Sequence[Deltas], value: Callable[[Deltas], float]) -> list[float]:
    """By how much a figure rises with a doubling of the rank, a seed; none of one rank alone."""
    by_seed = {d.seed: [o for o in found if o.seed == d.seed] for d in found}
    return [
        float(np.polyfit(np.log2([d.rank for d in own]), [value(d) for d in own], 1)[0])
        for own in by_seed.values()
        if len({d.rank for d in own}) > 1
    ]


def changes(found: Sequence[Deltas], value: Callable[[Deltas], float]) -> list[float]:
    """The highest rank less the lowest, a seed."""
    by_seed = {d.seed: [o for o in found if o.seed == d.seed] for d in found}
    return [value(own[-1]) - value(own[0]) for own in by_seed.values() if len(own) > 1]


def off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """Mean beside the diagonal."""
    values = np.array(matrix)
    return float(values[~np.eye(len(values), dtype=bool)].mean())


def on_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """Mean of the diagonal."""
    return float(np.diag(matrix).mean())


def permutation_p(matrices: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> float:
    """How often specialists permuted within each adapter have as large a mean diagonal; one-sided.

    Args:
        matrices: one [E, E] an adapter.
        seed: of the permutations.
    """
    generator = np.random.default_rng(seed)
    own = np.mean([on_diagonal(matrix) for matrix in matrices])
    drawn = np.zeros(PERMUTATIONS)
    for matrix in map(np.array, matrices):
        number = np.arange(len(matrix))
        order = generator.permuted(np.tile(number, (PERMUTATIONS, 1)), axis=1)
        drawn += matrix[number, order].mean(1) / len(matrices)
    return float((1 + (drawn >= own - 1e-12).sum()) / (1 + PERMUTATIONS))
