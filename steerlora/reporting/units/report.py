"""The report of an experiment on sparse units: claims, tables, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from steerlora.evaluation.records import BASE
from steerlora.reporting.drawing import COLOURS, WIDTH, name_ticks
from steerlora.reporting.effects import Measure, select
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.report import Report, write_stage_report
from steerlora.reporting.sequences import final, forgotten, mean
from steerlora.reporting.tables import OVER, Table, interval_fields, row_interval, row_of
from steerlora.reporting.units.claims import unit_claims
from steerlora.reporting.units.study import TARGET, UnitStudy

if TYPE_CHECKING:
    from steerlora.config import Config

FIGURE = "switched_off"


def write_units(config: Config, study: UnitStudy, provenance: dict[str, Any]) -> Report:
    """Write the report on some records into ``results.dir``."""
    records = [*study.evaluations, *study.sequentials, *study.units]
    settings = config.study
    return write_stage_report(
        config,
        records,
        provenance,
        claims=unit_claims(
            study, tuned=bool(settings.settings.get("tuned")), meaningful=settings.meaningful
        ),
        tables=[scores_table(study), forgetting_table(study), units_table(study)],
        figure=FIGURE,
        draw=partial(switched_off_figure, study),
        caption="Rise of each domain's cross-entropy where a domain's own units, or units of equal "
        "rate and norm, are switched off",
        note=replicates_text(sorted({r.seed for r in records if r.method != BASE})),
        varied=settings.vary,
    )


def _methods(records: Sequence[Any]) -> list[str]:
    """In the order in which the records have them."""
    return list(dict.fromkeys(record.method for record in records))


def scores_table(study: UnitStudy) -> Table | None:
    """A row a method: its mean target score and general knowledge."""
    groups = {TARGET: "target", "general_knowledge": "general knowledge"}
    rows = []
    for method in _methods(study.evaluations):
        own = select(study.evaluations, method=method)
        row: dict[str, Any] = {"method": method, "replicates": len(own)}
        for group in groups:
            found = [record.averages[group] for record in own if group in record.averages]
            measure = None
            if found:
                seeds = tuple(record.seed for record in own)
                values = tuple(one.value for one in found)
                errors = tuple(one.stderr for one in found)
                measure = Measure(method, seeds, values, None, errors, 0, ())
            row |= interval_fields(group, measure)
        rows.append(row)
    if not rows:
        return None
    return Table(
        "scores",
        f"Mean scores of every method ({OVER}).",
        pd.DataFrame(rows),
        ["method", *groups.values(), "replicates"],
        [
            row_of(
                row["method"], *(row_interval(row, g, 3) for g in groups), str(row["replicates"])
            )
            for row in rows
        ],
    )


def forgetting_table(study: UnitStudy) -> Table | None:
    """A row a method that was trained in sequences, with the overlap of its domains' units."""
    rows = []
    for method in _methods(study.sequentials):
        own = select(study.sequentials, method=method)
        units = select(study.units, method=method, training="sequence")
        overlap = None
        if units:
            values = tuple(record.figures["overlap/jaccard"] for record in units)
            seeds = tuple(record.seed for record in units)
            overlap = Measure(method, seeds, values, None, (0.0,) * len(units), 0, ())
        rows.append(
            {"method": method, "runs": len(own)}
            | interval_fields("forgetting", mean(own, forgotten))
            | interval_fields("final", mean(own, final))
            | interval_fields("overlap", overlap)
        )
    if not rows:
        return None
    keys = ("forgetting", "final", "overlap")
    return Table(
        "sequences",
        "Sequences of domains: mean positive forgetting, final average, and the Jaccard overlap "
        f"of the units that act most on each of two domains ({OVER}).",
        pd.DataFrame(rows),
        ["method", "positive forgetting", "final average", "overlap of units", "runs"],
        [
            row_of(row["method"], *(row_interval(row, key, 3) for key in keys), str(row["runs"]))
            for row in rows
        ],
    )


def units_table(study: UnitStudy) -> Table | None:
    """A row a figure of the units, for each method that has them."""
    kinds = dict.fromkeys((record.method, record.training) for record in study.units)
    rows = []
    for method, training in kinds:
        own = select(study.units, method=method, training=training)
        for name in own[0].figures:
            values = tuple(record.figures[name] for record in own)
            seeds = tuple(record.seed for record in own)
            measure = Measure(name, seeds, values, None, (0.0,) * len(own), 0, ())
            row = {"method": method, "training": training, "figure": name}
            rows.append(row | interval_fields("value", measure))
    if not rows:
        return None
    return Table(
        "units",
        f"What units stand for, how evenly they act, and what switching them off does ({OVER}).",
        pd.DataFrame(rows),
        ["method", "training", "figure", "value"],
        [
            row_of(row["method"], row["training"], row["figure"], row_interval(row, "value", 4))
            for row in rows
        ],
    )


def switched_off_figure(study: UnitStudy) -> Figure | None:
    """A panel for own units and one for their controls: domains that rise, by whose units are off;
    mean over replicates."""
    found = select(study.units, method=study.roles.get("sparse"), training="joint")
    if not found:
        return None
    domains = list(found[0].intact)
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("own", "control"), strict=True):
        rises = np.mean(
            [
                [[getattr(one, what)[name] for name in domains] for one in record.switched_off]
                for record in found
            ],
            axis=0,
        )  # [whose units, domain]
        width = 0.8 / len(domains)
        for place, name in enumerate(domains):
            at = np.arange(len(domains)) + width * (place - (len(domains) - 1) / 2)
            axis.bar(at, rises[:, place], width * 0.9, color=COLOURS[place % 8], label=name)
        name_ticks(axis, domains, rotate=True)
        axis.set_title({"own": "own units off", "control": "matched units off"}[what])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.grid(axis="y")
    axes[0].set_ylabel("rise, nats a token")
    axes[1].legend(title="of the text of", fontsize=8)
    return figure
