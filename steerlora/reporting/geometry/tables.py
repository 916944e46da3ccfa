"""Tables of experiment ``geometry``: means over adapters with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from steerlora.evaluation.statistics import t_interval
from steerlora.reporting.geometry.quantities import (
    off_diagonal,
    on_diagonal,
    reference_of,
    subspace_size,
)
from steerlora.reporting.tables import Table, interval_text, row_of
from steerlora.saes.geometry.records import KINDS, Deltas, Geometry, Specialists

OVER = "mean over adapters with its 95 % interval"
Values = dict[str, Callable[[Deltas], float]]
"""{column: figure of an adapter's deltas}."""


def _groups(record: Geometry, kinds: Sequence[str]) -> dict[tuple, list[Deltas]]:
    """{(layer, method, rank, kind): its adapters}, in that order."""
    groups: dict[tuple, list[Deltas]] = {}
    for one in record.deltas:
        if one.kind in kinds:
            groups.setdefault((one.layer, one.method, one.rank, one.kind), []).append(one)
    order = list(KINDS)
    return dict(sorted(groups.items(), key=lambda item: (*item[0][:3], order.index(item[0][3]))))


def _table(
    name: str, caption: str, record: Geometry, kinds: Sequence[str], values: Values
) -> Table | None:
    """One row a layer, method, rank and kind; one column a figure."""
    rows, shown = [], []
    for (layer, method, rank, kind), found in _groups(record, kinds).items():
        row: dict[str, Any] = {"layer": layer, "method": method, "rank": rank, "deltas": kind}
        row["adapters"] = len(found)
        cells = [str(layer), method, str(rank), kind.replace("_", " "), str(len(found))]
        for column, value in values.items():
            interval = t_interval([value(one) for one in found])
            key = column.lower().replace(" ", "_")
            row |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
            cells.append(interval_text(interval, 3))
        rows.append(row)
        shown.append(row_of(*cells))
    if not rows:
        return None
    columns = ["Layer", "Method", "Rank", "Deltas", "Adapters", *values]
    return Table(name, f"{caption}; {OVER}.", pd.DataFrame(rows), columns, shown)


def likeness_table(record: Geometry) -> Table | None:
    """How like delta SAEs are to the base's, beside chance and beside two SAEs of one stream."""
    size = subspace_size(record)
    values: Values = {
        "Cosine": lambda d: d.likeness.alignment,
        "of covariance": lambda d: d.matched.alignment,
        "at random": lambda d: d.random.alignment,
        "of two SAEs": lambda d: reference_of(record, d).likeness.alignment,
        "Angle": lambda d: d.likeness.angles[size],
        "Angle of covariance": lambda d: d.matched.angles[size],
        "Angle at random": lambda d: d.random.angles[size],
        "Angle of two SAEs": lambda d: reference_of(record, d).likeness.angles[size],
        "CKA": lambda d: d.likeness.cka,
        "CKA permuted": lambda d: d.random.cka,
        "CKA of two SAEs": lambda d: reference_of(record, d).likeness.cka,
    }
    caption = (
        "Likeness to the base's SAE: largest cosine of a direction, mean principal angle of "
        f"subspaces of {size} dimensions in degrees, linear CKA of features; each beside "
        "directions with the deltas' covariance, random ones (of CKA: tokens permuted), and two "
        "SAEs of the stream"
    )
    return _table("likeness", caption, record, ("trained", "equal_norm"), values)


def reconstruction_table(record: Geometry) -> Table | None:
    """What is left unexplained of deltas at equal L0."""
    names = {
        "Base SAE": "base_raw",
        "refitted": "base_refitted",
        "pursuit": "base_pursuit",
        "random pursuit": "random_pursuit",
        "covariance pursuit": "matched_pursuit",
        "PCA": "pca",
        "PCA of rank": "pca_rank",
    }
    values: Values = {"Delta SAE": lambda d: d.unexplained}
    for label, name in names.items():
        values[label] = lambda d, name=name: getattr(d.reconstructions, name)
    caption = (
        f"Fraction of held-out deltas' variance unexplained with {record.k} active latents a "
        "token: by the delta SAE; by the base's SAE given the delta as it is, and at the stream's "
        "scale with refitted biases; by non-negative pursuit on its decoder, on random directions "
        "and on directions with the deltas' covariance; by as many principal components, and by as "
        "many as the adapter's rank"
    )
    return _table("reconstruction", caption, record, ("trained",), values)


def controls_table(record: Geometry) -> Table | None:
    """Norms, effective ranks, density and error of every kind of deltas."""
    values: Values = {
        "Update norm": lambda d: d.update_norm,
        "Delta norm": lambda d: d.stream_norm,
        "Rank of stream": lambda d: d.stream_rank,
        "Rank of modules": lambda d: d.module_rank,
        "Alive": lambda d: d.alive,
        "Unexplained": lambda d: d.unexplained,
        "Cosine": lambda d: d.likeness.alignment,
        "two of the same": lambda d: np.nan if d.reseeded is None else d.reseeded,
    }
    caption = (
        "Deltas of every kind: norm of the update, mean length over the stream's, effective rank "
        "in the stream and of the modules' own outputs, share of the SAE's latents that are alive, "
        "its error, its largest cosine with the base's dictionary, and with another SAE of the "
        "same deltas"
    )
    return _table("controls", caption, record, tuple(KINDS), values)


def specialists_table(record: Geometry) -> Table | None:
    """Whether specialists share a dictionary, and write along what routes to them."""
    groups: dict[tuple[int, str], list[Specialists]] = {}
    for one in record.specialists:
        groups.setdefault((one.layer, one.method), []).append(one)
    if not groups:
        return None
    values = {
        "Cosine, same": lambda s: on_diagonal(s.shared),
        "others'": lambda s: off_diagonal(s.shared),
        "chance": lambda s: off_diagonal(s.chance),
        "Unexplained, own": lambda s: on_diagonal(s.crossed),
        "by others'": lambda s: off_diagonal(s.crossed),
        "In own features": lambda s: on_diagonal(s.routed) if s.routed else np.nan,
        "in others'": lambda s: off_diagonal(s.routed) if s.routed else np.nan,
        "in random ones": lambda s: float(np.mean(s.routed_random)) if s.routed else np.nan,
    }
    rows, shown = [], []
    for (layer, method), found in sorted(groups.items()):
        row: dict[str, Any] = {"layer": layer, "method": method, "adapters": len(found)}
        cells = [str(layer), method, str(len(found))]
        for column, value in values.items():
            interval = t_interval([value(one) for one in found])
            key = column.lower().replace(" ", "_").replace("'", "").replace(",", "")
            row |= {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
            cells.append(interval_text(interval, 3))
        rows.append(row)
        shown.append(row_of(*cells))
    caption = (
        "Specialists of one adapter: largest cosine of a specialist's dictionary with a second one "
        "of the same deltas, with those of other specialists, and of directions with the deltas' "
        "covariance; error of a specialist's SAE on its own deltas and on others'; share of its "
        "deltas in the span of the features that route to it, to others, and of random ones; "
        f"{OVER}."
    )
    columns = ["Layer", "Method", "Adapters", *values]
    return Table("specialists", caption, pd.DataFrame(rows), columns, shown)
