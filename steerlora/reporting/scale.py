"""The table of scale: every model, base and adapted."""

from __future__ import annotations

import pandas as pd

from steerlora.reporting import labels
from steerlora.reporting.effects import gain, select
from steerlora.reporting.labels import adapter_label, in_order, score_label
from steerlora.reporting.tables import (
    MISSING,
    Cell,
    Table,
    best_cells,
    interval_fields,
    mean_and_error,
    number,
)


def scale_table(evaluations: list[dict], *, meaningful: bool) -> Table | None:
    """Every model, base and adapted: task-group averages, target domains, gains over base."""
    if not evaluations:
        return None
    rows = [
        _scale_row(evaluations, model, adapter)
        for model in dict.fromkeys(record["model"] for record in evaluations)
        for adapter in in_order(
            (record["adapter"] for record in select(evaluations, model=model)), labels.ADAPTERS
        )
    ]
    data = pd.DataFrame(rows)
    scores = [c.removesuffix("_stderr") for c in data.columns if c.endswith("_stderr")]
    scores = [column for column in scores if data[column].notna().any()]
    best = {}
    for column in scores:
        adapted = data[data.adapter != labels.BASE]
        for _, part in adapted.groupby("model", sort=False):
            marks = best_cells(
                part[column].tolist(), part[f"{column}_stderr"].tolist(), meaningful=meaningful
            )
            best |= {(index, column): mark for index, mark in zip(part.index, marks, strict=True)}
    cells = []
    for index, row in data.iterrows():
        texts = [Cell(row.model), Cell(adapter_label(row.adapter)), Cell(str(row.seeds))]
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
        f"Scale: mean over seeds ± standard error (seeds and items), {score_label(evaluations)}; "
        "in brackets the gain over the base model; bold leads its model's adapters by more than "
        "the standard errors explain."
    )
    return Table("scale", caption, data, ["Model", "Adapter", "Seeds", *headings], cells)


def _scale_row(evaluations: list[dict], model: str, adapter: str) -> dict:
    records = select(evaluations, model=model, adapter=adapter)
    row: dict = {"model": model, "adapter": adapter, "seeds": len(records)}
    for group in labels.GROUPS:
        scores = [record["averages"].get(group) for record in records]
        row |= mean_and_error(group, scores)
        if adapter != labels.BASE:
            measure = gain(evaluations, model, adapter, group)
            row |= interval_fields(f"{group}_gain", measure and measure.interval)
    for domain in records[0]["domains"]:
        tasks = [record.get("target_tasks", {}).get(domain) for record in records]
        scores = [record["tasks"].get(task) for record, task in zip(records, tasks, strict=True)]
        row |= mean_and_error(f"target_{domain}", scores)
    return row
