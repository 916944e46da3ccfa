"""The report of an experiment on SAEs in place of streams: claims, tables, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from steerlora.evaluation.splicing import Splicing
from steerlora.reporting.drawing import COLOURS, PAPER, WIDTH
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.report import Report, write_stage_report
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
    study = Study.of(records, config.study.settings.get("references", {}))
    seeds = sorted({record.seed for record in records})
    return write_stage_report(
        config,
        records,
        provenance,
        claims=splicing_claims(study, meaningful=config.study.meaningful),
        tables=[shares_table(study), streams_table(study), scores_table(study)],
        figure=FIGURE,
        draw=partial(shares_figure, study),
        caption="Share of the gap in cross-entropy that each condition closes, with 95 % "
        "intervals; grey: the paper's range",
        note=f"{replicates_text(seeds)}; {len(records[0].tokens)} rows of text",
        varied=config.study.vary,
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
