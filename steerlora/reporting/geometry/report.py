"""The report of experiment ``geometry``: claims, tables, a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerlora.evaluation.statistics import t_interval
from steerlora.reporting.drawing import COLOURS, panels
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.geometry.claims import geometry_claims
from steerlora.reporting.geometry.quantities import (
    layers_of,
    reference_of,
    subspace_size,
    swept,
)
from steerlora.reporting.geometry.tables import (
    controls_table,
    likeness_table,
    reconstruction_table,
    specialists_table,
)
from steerlora.reporting.report import Report, write_stage_report
from steerlora.saes.geometry.likeness import Likeness
from steerlora.saes.geometry.records import Deltas, Geometry

if TYPE_CHECKING:
    from steerlora.config import Config

FIGURE = "likeness"


def write_geometry(config: Config, record: Geometry, provenance: dict[str, Any]) -> Report:
    """Write the report on a record into ``results.dir``."""
    seeds = sorted({d.seed for d in record.deltas})
    return write_stage_report(
        config,
        [record],
        provenance,
        claims=geometry_claims(record, meaningful=config.study.meaningful),
        tables=[
            likeness_table(record),
            reconstruction_table(record),
            controls_table(record),
            specialists_table(record),
        ],
        figure=FIGURE,
        draw=partial(likeness_figure, record),
        caption="Largest cosine with the base's dictionary, and mean principal angle, by rank and "
        "layer: delta SAEs beside chance and beside two SAEs of the same stream",
        note=f"{replicates_text(seeds)} of every rank; {record.held_out:,} held-out tokens",
        varied=["adapter"],
    )


def likeness_figure(record: Geometry) -> Figure:
    """Alignment above, angles below, a column a layer."""
    layers = layers_of(record)
    size = subspace_size(record)
    figure, axes = panels(2 * len(layers), columns=len(layers), height=2.6)
    rows: tuple[tuple[str, Callable[[Likeness], float]], ...] = (
        ("largest cosine", lambda found: found.alignment),
        (f"principal angle, k = {size} (°)", lambda found: found.angles[size]),
    )
    for row, (label, value) in enumerate(rows):
        for column, layer in enumerate(layers):
            axis, found = axes[row * len(layers) + column], swept(record, layer)
            lines = {
                "delta SAE, alpha = r": (found, [d.likeness for d in found]),
                "chance, deltas' covariance": (found, [d.matched for d in found]),
                "chance, random": (found, [d.random for d in found]),
                "two SAEs of the stream": (
                    found,
                    [reference_of(record, d).likeness for d in found],
                ),
            }
            if equal := swept(record, layer, "equal_norm"):
                lines["delta SAE, equal norm"] = (equal, [d.likeness for d in equal])
            for number, (name, (deltas, likenesses)) in enumerate(lines.items()):
                _line(axis, deltas, [*map(value, likenesses)], name, COLOURS[number])
            if row == 0:
                axis.set_title(f"stream entering layer {layer}")
            if column == 0:
                axis.set_ylabel(label)
            axis.grid(axis="y")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(layers), 2), fontsize=8)
    figure.supxlabel("rank", fontsize=10)
    return figure


def _line(
    axis: Axes, deltas: Sequence[Deltas], values: Sequence[float], name: str, colour: str
) -> None:
    """Means over adapters by rank, with 95 % intervals."""
    by_rank: dict[int, list[float]] = {}
    for one, value in zip(deltas, values, strict=True):
        by_rank.setdefault(one.rank, []).append(value)
    found = [t_interval(values) for values in by_rank.values()]
    middle = np.array([one.value for one in found])
    arms = np.array([(one.value - one.low, one.high - one.value) for one in found]).T
    axis.errorbar(
        list(by_rank), middle, np.nan_to_num(arms), label=name, color=colour, marker="o",
        markersize=3, linewidth=1, capsize=2,
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(by_rank), [str(rank) for rank in by_rank])
