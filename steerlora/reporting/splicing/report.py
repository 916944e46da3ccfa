"""The report of an experiment on SAEs in place of streams: claims, tables, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from steerlora.evaluation.splicing import Splicing
from steerlora.reporting.drawing import COLOURS, PAPER, STYLE, WIDTH, as_svg, save
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.report import Drawn, Report, provenance_json, write_parts
from steerlora.reporting.splicing.claims import HIGH, LOW, splicing_claims
from steerlora.reporting.splicing.shares import Study
from steerlora.reporting.splicing.tables import scores_table, shares_table, streams_table

if TYPE_CHECKING:
    from steerlora.config import Config

FIGURE = "shares_closed"


def write_splicing(
    config: Config, records: Sequence[Splicing], provenance: dict[str, Any]
) -> Report:
    """Write the report on some records into ``results.dir``."""
    settings, directory = config.study, Path(config.results.dir)
    directory.mkdir(parents=True, exist_ok=True)
    study = Study.of(records, settings.settings.get("references", {}))
    seeds = sorted({record.seed for record in records})
    note = f"{replicates_text(seeds)}; {len(records[0].tokens)} rows of text"
    drawn, meaningful = [], settings.meaningful
    with rc_context(STYLE):
        figure = shares_figure(study)
        if figure is not None:
            place = directory / f"{FIGURE}.png"
            files = save(figure, place, meaningful=meaningful, note=note)
            caption = (
                "Share of the gap in cross-entropy that each condition closes, with 95 % "
                f"intervals; grey: the paper's range; {note}."
            )
            drawn.append(Drawn(files, caption, as_svg(figure)))
    made = [shares_table(study), streams_table(study), scores_table(study)]
    return write_parts(
        directory,
        name=settings.name,
        meaningful=meaningful,
        claims=splicing_claims(study, meaningful=meaningful),
        tables=[table for table in made if table is not None],
        drawn=drawn,
        provenance=provenance_json(provenance, settings.name, meaningful, list(records)),
        varied=settings.vary,
    )


SHOWN = (-100.0, 110.0)
"""Shares, in percent, that the figure has room for; a lower one is written on its bar."""


def shares_figure(study: Study) -> Figure | None:
    """A bar a condition; None where no gap means anything."""
    data = shares_table(study).data
    data = data[data.share_percent.notna()].iloc[::-1]
    if data.empty:
        return None
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(data)))
    axis = figure.subplots()
    axis.axvspan(LOW, HIGH, color=PAPER, alpha=0.4, linewidth=0)
    places = np.arange(len(data))
    axis.barh(places, data.share_percent, 0.7, color=COLOURS[0], zorder=2)
    arms = np.vstack([data.share_percent - data.share_low, data.share_high - data.share_percent])
    axis.errorbar(
        data.share_percent, places, xerr=np.nan_to_num(arms).clip(min=0), fmt="none",
        ecolor="black", elinewidth=1, capsize=2.5, zorder=3,
    )  # fmt: skip
    axis.set_yticks(places, [name.replace("_", " ") for name in data.condition])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.grid(axis="x")
    # Controls may lose many times the gap; beside them nothing else would be seen.
    axis.set_xlim(*SHOWN)
    for place, share in zip(places, data.share_percent, strict=True):
        if share < SHOWN[0]:
            axis.annotate(
                f"{share:.0f} %", (SHOWN[0], place), (4, 0), textcoords="offset points",
                va="center", fontsize=9, color="white", zorder=4,
            )  # fmt: skip
    figure.supxlabel("share of the gap closed, %", fontsize=10)
    return figure
