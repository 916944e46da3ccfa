"""The tables of sequential adaptation: forgetting by method and order, and what the order does."""

from __future__ import annotations

import numpy as np
import pandas as pd

from steerlora.evaluation.forgetting import METRICS, positive_forgetting
from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.statistics import combined_error, holm, standard_error
from steerlora.reporting import labels
from steerlora.reporting.effects import select
from steerlora.reporting.labels import in_order
from steerlora.reporting.methods import Methods
from steerlora.reporting.sequences import (
    broad_first,
    forgotten,
    kept,
    ordered,
    p_value,
    reduction,
    twins,
)
from steerlora.reporting.tables import (
    Cell,
    Table,
    interval_fields,
    leaders,
    mean_text,
    number,
    row_interval,
    row_of,
)

MAX_ORDERS = 6
"""Orders with rows of their own in the table for people; the CSV file has all."""


def forgetting_table(
    sequentials: list[DomainSequence], methods: Methods, *, meaningful: bool
) -> Table | None:
    """Every method and order, and order classes: forgetting, transfer, reduction against LoRA."""
    if not sequentials:
        return None
    classes = {
        "all": lambda r: True,
        "broad_first": broad_first,
        "other": lambda r: not broad_first(r),
    }
    rows = []
    for model in dict.fromkeys(record.model for record in sequentials):
        records = select(sequentials, model=model)
        orders = in_order((r.order for r in records), ("broad_first", "broad_last"))
        parts = [("class", name, keep) for name, keep in classes.items()]
        parts += [("order", o, lambda r, o=o: r.order == o) for o in orders]
        for kind, name, keep in parts:
            chosen = [record for record in records if keep(record)]
            rows += _forgetting_rows({"model": model, "part": kind, "order": name}, chosen, methods)
    data = pd.DataFrame(rows)
    groups = ["model", "part", "order"]
    best = leaders(data, "positive_forgetting", groups, meaningful=meaningful, lowest=True)
    many = data[data.part == "order"].order.nunique() > MAX_ORDERS
    shown = data[data.part == "class"] if many else data
    general = data.general.notna().any()
    cells = [
        row_of(
            row.model,
            labels.ORDER_CLASSES[row.order] if row.part == "class" else row.order,
            methods.label(row.method),
            str(row.runs),
            Cell(mean_text(row, "positive_forgetting"), index in best),
            *(number(row[name], sign="transfer" in name) for name in list(labels.METRICS)[1:]),
            *([row_interval(row, "general", 2)] if general else []),
            row_interval(row, "reduction_percent", 1),
            "" if row.method == methods.baseline else number(row.p_holm),
        )
        for index, row in shown.iterrows()
    ]
    headings = ["Model", "Order", "Method", "Runs", *labels.METRICS.values()]
    headings += ["General kept"] if general else []
    headings += [f"Reduction vs {methods.baseline}", "p (Holm)"]
    caption = (
        "Sequential adaptation, score: mean over runs (orders × seeds); "
        "± is the standard error from runs and items; the reduction of positive forgetting is "
        f"against {methods.baseline}, in percent [95 % bootstrap interval over orders, seeds and "
        "items]; p: its paired permutation test over runs, Holm-corrected over methods."
    )
    if general:
        caption += " General kept: general knowledge after the sequence, as a share of the base's."
    if many:
        caption += " Single orders are in the CSV file."
    return Table("forgetting", caption, data, headings, cells)


def _forgetting_rows(where: dict, records: list[DomainSequence], methods: Methods) -> list[dict]:
    """A row a method; ``records`` are those of one model and class of orders."""
    names, baseline = methods.sorted(record.method for record in records), methods.baseline
    p_values = corrected(
        {name: p_value(records, name, baseline, forgotten) for name in names if name != baseline}
    )
    return [
        where
        | {"method": name}
        | _forgetting_row(records, name, baseline)
        | {"p_holm": p_values.get(name, np.nan)}
        for name in names
    ]


def _forgetting_row(records: list[DomainSequence], method: str, baseline: str) -> dict:
    own = select(records, method=method)
    metrics = {m.__name__: [m(ordered(record)[0]) for record in own] for m in METRICS}
    row: dict = {"runs": len(own), "seeds": len({record.seed for record in own})}
    for name, values in metrics.items():
        row[name] = float(np.mean(values))
        row[f"{name}_stderr"] = standard_error(values) if len(values) > 1 else np.nan
    row["positive_forgetting_stderr"] = combined_error(
        metrics[positive_forgetting.__name__], [forgotten(record).stderr for record in own]
    )
    measure = reduction(records, method, baseline) if method != baseline else None
    row |= interval_fields("general", kept(own))
    return row | interval_fields("reduction_percent", measure and measure.interval)


def corrected(p_values: dict[str, float]) -> dict[str, float]:
    """P-values after Holm's correction over those that are known."""
    known = {name: p for name, p in p_values.items() if p == p}
    adjusted = holm(list(known.values())).tolist()
    return p_values | dict(zip(known, adjusted, strict=True))


def order_effects_table(sequentials: list[DomainSequence], methods: Methods) -> Table | None:
    """What it changes to move the broad domain to the front, method by method."""
    rows = []
    for model in dict.fromkeys(record.model for record in sequentials):
        records = select(sequentials, model=model)
        names = methods.sorted(record.method for record in records)
        found = {name: twins(select(records, method=name)) for name in names}
        found = {name: effect for name, effect in found.items() if effect is not None}
        p_values = corrected({name: effect.p for name, effect in found.items()})
        rows += [
            {
                "model": model,
                "method": name,
                "pairs": effect.pairs,
                "orders": effect.orders,
                "broad_first": effect.first,
                "broad_later": effect.later,
            }
            | interval_fields("difference", effect.difference)
            | {"p_holm": p_values[name]}
            for name, effect in found.items()
        ]
    if not rows:
        return None
    data = pd.DataFrame(rows)
    cells = [
        row_of(
            row.model,
            methods.label(row.method),
            f"{row.pairs} ({row.orders})",
            number(row.broad_first),
            number(row.broad_later),
            row_interval(row, "difference", 3, sign=True),
            number(row.p_holm),
        )
        for _, row in data.iterrows()
    ]
    headings = ["Model", "Method", "Pairs (orders)", "Broad first", "Broad later", "Difference"]
    caption = (
        "Broad data first, or not: mean positive forgetting of orders, and of their twins in which "
        "the broad domain has been moved to the front and the others keep their order (same "
        "method, same seed); difference first less later, negative where coming first lessens "
        "forgetting [95 % bootstrap interval over orders, seeds and items]; p: paired permutation "
        "test over pairs, Holm-corrected over methods."
    )
    return Table("order_effects", caption, data, [*headings, "p (Holm)"], cells)
