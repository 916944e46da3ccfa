"""The table of scale: every model, base and adapted."""

from __future__ import annotations

import numpy as np
import pandas as pd

from steerlora.evaluation.records import BASE, Evaluation
from steerlora.reporting import labels
from steerlora.reporting.effects import gain, select
from steerlora.reporting.methods import Methods
from steerlora.reporting.tables import (
    ERROR,
    Cell,
    Table,
    interval_fields,
    leaders,
    mean_and_error,
    mean_text,
    number,
    row_of,
)

GENERAL = "general_knowledge"


def scale_table(
    evaluations: list[Evaluation],
    methods: Methods,
    *,
    meaningful: bool,
    least_general: float | None = None,
) -> Table | None:
    """Every model, base and adapted: task-group averages, target domains, gains over base.

    Args:
        evaluations: of models without any intervention.
        methods: the parts that methods have in the report.
        meaningful: False for a smoke run, which has no leaders.
        least_general: general knowledge that every base should have; a note says which have not.
    """
    if not evaluations:
        return None
    rows = [
        _scale_row(evaluations, model, method)
        for model in dict.fromkeys(record.model for record in evaluations)
        for method in methods.sorted(record.method for record in select(evaluations, model=model))
    ]
    data = pd.DataFrame(rows)
    scores = [c.removesuffix("_stderr") for c in data.columns if c.endswith("_stderr")]
    scores = [column for column in scores if data[column].notna().any()]
    adapted = data[data.method != BASE]
    best = {name: leaders(adapted, name, ["model"], meaningful=meaningful) for name in scores}
    cells = [
        row_of(
            row.model,
            methods.label(row.method),
            str(row.seeds),
            *(Cell(_score_text(row, name), index in best[name]) for name in scores),
        )
        for index, row in data.iterrows()
    ]
    headings = [
        labels.group_label(c, evaluations) if c in labels.GROUPS else c.removeprefix("target_")
        for c in scores
    ]
    caption = (
        f"Scale: mean over replicates ± its standard error ({ERROR}), score; "
        "in brackets the gain over the base model; bold leads its model's adapters by more than "
        "the standard errors explain."
    )
    notes = () if least_general is None else (_knowledge_note(evaluations, least_general),)
    columns = ["Model", "Method", "Replicates", *headings]
    return Table("scale", caption, data, columns, cells, notes)


def _knowledge_note(evaluations: list[Evaluation], least: float) -> str:
    """Which bases know less than they should."""
    scores = {
        f"{record.model} of replicate {record.seed}": record.averages[GENERAL].value
        for record in select(evaluations, method=BASE)
        if GENERAL in record.averages
    }
    short = [f"{name} ({number(value)})" for name, value in scores.items() if value < least]
    said = f"Bases with general knowledge below {number(least, 2)}, of {len(scores)}: "
    return said + (", ".join(short) if short else "none") + "."


def _score_text(row: pd.Series, name: str) -> str:
    gained = row.get(f"{name}_gain", np.nan)
    return mean_text(row, name) + (f" ({number(gained, sign=True)})" if gained == gained else "")


def _scale_row(evaluations: list[Evaluation], model: str, method: str) -> dict:
    records = select(evaluations, model=model, method=method)
    row: dict = {"model": model, "method": method, "seeds": len(records)}
    for group in labels.GROUPS:
        scores = [record.averages.get(group) for record in records]
        row |= mean_and_error(group, scores)
        if method != BASE:
            measure = gain(evaluations, model, method, group)
            row |= interval_fields(f"{group}_gain", measure)
    for domain in records[0].domains:
        scores = [record.tasks.get(record.target_tasks.get(domain)) for record in records]
        row |= mean_and_error(f"target_{domain}", scores)
    return row
