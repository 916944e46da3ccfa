"""The table of scale: every model, base and adapted."""

from __future__ import annotations

import pandas as pd

from steerlora.evaluation.records import BASE, Evaluation
from steerlora.reporting import labels
from steerlora.reporting.effects import gain, select
from steerlora.reporting.methods import Methods
from steerlora.reporting.tables import (
    MISSING,
    Cell,
    Table,
    best_cells,
    interval_fields,
    mean_and_error,
    number,
)


def scale_table(
    evaluations: list[Evaluation], methods: Methods, *, meaningful: bool
) -> Table | None:
    """Every model, base and adapted: task-group averages, target domains, gains over base."""
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
    best = {}
    for column in scores:
        adapted = data[data.method != BASE]
        for _, part in adapted.groupby("model", sort=False):
            marks = best_cells(
                part[column].tolist(), part[f"{column}_stderr"].tolist(), meaningful=meaningful
            )
            best |= {(index, column): mark for index, mark in zip(part.index, marks, strict=True)}
    cells = []
    for index, row in data.iterrows():
        texts = [Cell(row.model), Cell(methods.label(row.method)), Cell(str(row.seeds))]
        for column in scores:
            text = number(row[column])
            if text != MISSING and row[f"{column}_stderr"] == row[f"{column}_stderr"]:
                text += f" ± {number(row[f'{column}_stderr'])}"
            change = row.get(f"{column}_gain")
            if change is not None and change == change:
                text += f" ({number(change, sign=True)})"
            texts.append(Cell(text, best.get((index, column), False)))
        cells.append(texts)
    headings = [labels.GROUPS.get(c, c.removeprefix("target_")) for c in scores]
    caption = (
        "Scale: mean over seeds ± standard error (seeds and items), score; "
        "in brackets the gain over the base model; bold leads its model's adapters by more than "
        "the standard errors explain."
    )
    return Table("scale", caption, data, ["Model", "Method", "Seeds", *headings], cells)


def _scale_row(evaluations: list[Evaluation], model: str, method: str) -> dict:
    records = select(evaluations, model=model, method=method)
    row: dict = {"model": model, "method": method, "seeds": len(records)}
    for group in labels.GROUPS:
        scores = [record.averages.get(group) for record in records]
        row |= mean_and_error(group, scores)
        if method != BASE:
            measure = gain(evaluations, model, method, group)
            row |= interval_fields(f"{group}_gain", measure and measure.interval)
    for domain in records[0].domains:
        scores = [record.tasks.get(record.target_tasks.get(domain)) for record in records]
        row |= mean_and_error(f"target_{domain}", scores)
    return row
