"""The report of an experiment on steering: claims, tables, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from steerlora.evaluation.statistics import t_interval
from steerlora.evaluation.steering import PARTS, SteeringRecord
from steerlora.reporting.drawing import COLOURS, WIDTH
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.report import Report, write_stage_report
from steerlora.reporting.steering.claims import steering_claims
from steerlora.reporting.steering.study import Study
from steerlora.reporting.tables import (
    MISSING,
    OVER,
    Table,
    interval_fields,
    interval_text,
    number,
    row_interval,
    row_of,
)

if TYPE_CHECKING:
    from steerlora.config import Config

FIGURE = "steered"


def write_steering(
    config: Config, records: Sequence[SteeringRecord], provenance: dict[str, Any]
) -> Report:
    """Write the report on some records into ``results.dir``."""
    study = Study.of(records)
    return write_stage_report(
        config,
        records,
        provenance,
        claims=steering_claims(study, meaningful=config.study.meaningful),
        tables=[ways_table(study), concepts_table(study)],
        figure=FIGURE,
        draw=partial(ways_figure, study),
        caption="Score of every way to steer, from 0 to 2, with 95 % intervals",
        note=f"{replicates_text(sorted({r.seed for r in records}))}; "
        f"{len(records[0].concepts)} concepts",
        varied=config.study.vary,
    )


def _plain(way: str) -> str:
    return way.replace("_", " ")


def ways_table(study: Study) -> Table | None:
    """A row a way: its score and the score's parts, and how well it tells texts."""
    rows, shown = [], []
    for way, found in study.records.items():
        row: dict[str, Any] = {"way": way, "replicates": len(found)}
        row |= interval_fields("score", study.score(way))
        cells = [_plain(way), row_interval(row, "score", 3)]
        for part in PARTS:
            row[part] = float(np.mean([record.grade(part) for record in found.values()]))
            cells.append(number(row[part], 2))
        for name in ("f1", "auroc", "factor"):
            row[name] = float(np.mean([record.mean(name) for record in found.values()]))
            cells.append(number(row[name], 2) if np.isfinite(row[name]) else MISSING)
        rows.append(row)
        shown.append(row_of(*cells, str(len(found))))
    if not rows:
        return None
    return Table(
        "ways",
        "Every way to steer: harmonic mean of concept, instruction and fluency, each from 0 to 2, "
        f"at the strength that other prompts chose ({OVER}). F1, calibrated, and AUROC: of what "
        "steers, on labelled texts that did not choose it. Factor: the chosen strength, in mean "
        "lengths of a token's stream, of LoRA in lengths of its update.",
        pd.DataFrame(rows),
        ["Way", "Score", *(p.capitalize() for p in PARTS), "F1", "AUROC", "Factor", "Replicates"],
        shown,
    )


def concepts_table(study: Study) -> Table | None:
    """A row a concept: the score of each way."""
    scores: dict[str, dict[str, list[float]]] = {}
    for way, found in study.records.items():
        for record in found.values():
            for one in record.concepts:
                own = scores.setdefault(one.concept, {}).setdefault(way, [])
                own.append(float(np.mean(one.scores)))
    if not scores:
        return None
    ways = list(study.records)
    rows = [
        {"concept": concept} | {way: float(np.mean(own.get(way, [np.nan]))) for way in ways}
        for concept, own in scores.items()
    ]
    shown = [
        row_of(row["concept"], *(interval_text(t_interval(scores[row["concept"]].get(way, [])), 2)
                                 if len(scores[row["concept"]].get(way, [])) > 1
                                 else number(row[way], 2) for way in ways))
        for row in rows
    ]  # fmt: skip
    return Table(
        "concepts",
        f"Score of each concept ({OVER}).",
        pd.DataFrame(rows),
        ["Concept", *map(_plain, ways)],
        shown,
    )


def ways_figure(study: Study) -> Figure | None:
    """A bar a way, the best first."""
    table = ways_table(study)
    if table is None:
        return None
    data = table.data.sort_values("score")
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(data)))
    axis, places = figure.subplots(), np.arange(len(data))
    axis.barh(places, data.score, 0.7, color=COLOURS[0], zorder=2)
    arms = np.vstack([data.score - data.score_low, data.score_high - data.score])
    axis.errorbar(
        data.score, places, xerr=np.nan_to_num(arms).clip(min=0), fmt="none",
        ecolor="black", elinewidth=1, capsize=2.5, zorder=3,
    )  # fmt: skip
    axis.set_yticks(places, [_plain(way) for way in data.way])
    axis.set_xlim(0)
    axis.grid(axis="x")
    figure.supxlabel("score, from 0 to 2", fontsize=10)
    return figure
