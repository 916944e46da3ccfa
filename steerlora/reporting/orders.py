"""The tables of sequential adaptation: forgetting by method and order, and what the order does."""

from __future__ import annotations

import numpy as np
import pandas as pd

from steerlora.evaluation.forgetting import METRICS
from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import holm
from steerlora.reporting import labels
from steerlora.reporting.effects import by_method, select
from steerlora.reporting.labels import in_order
from steerlora.reporting.methods import Methods
from steerlora.reporting.sequences import (
    broad_first,
    by_replicate,
    forgotten,
    kept,
    ordered,
    p_value,
    reduction,
    twins,
)
from steerlora.reporting.tables import (
    ERROR,
    OVER,
    Cell,
    Table,
    interval_fields,
    leaders,
    mean_and_error,
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
        has_broad = any(record.broad for record in records)
        parts = [("class", n, keep) for n, keep in classes.items() if has_broad or n == "all"]
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
        "Sequential adaptation, score: mean over replicates, of each the mean over its orders "
        f"(runs: both) ± its standard error ({ERROR}); the reduction of positive forgetting is "
        f"against {methods.baseline}, in percent [{OVER}]; p: paired t-test of positive "
        "forgetting over replicates, Holm-corrected over methods."
    )
    if general:
        caption += " General kept: general knowledge after the sequence, as a share of the base's."
    if many:
        caption += " Single orders are in the CSV file."
    return Table("forgetting", caption, data, headings, cells)


def _forgetting_rows(where: dict, records: list[DomainSequence], methods: Methods) -> list[dict]:
    """A row a method; ``records`` are those of one model and class of orders."""
    baseline, rows = methods.baseline, []
    p_values = against(records, baseline)
    for name in methods.sorted(record.method for record in records):
        own = select(records, method=name)
        row = where | {"method": name, "runs": len(own), "seeds": len({r.seed for r in own})}
        for metric in METRICS:
            # The items' error is known of one metric alone.
            found = by_replicate(own, lambda r, f=metric: Estimate(f(ordered(r)[0]), np.nan))
            row |= mean_and_error(metric.__name__, list(found.values()))
        found = by_replicate(own, forgotten)
        row |= mean_and_error("positive_forgetting", list(found.values()))
        row |= interval_fields("general", kept(own))
        reduced = reduction(records, name, baseline) if name != baseline else None
        row |= interval_fields("reduction_percent", reduced)
        rows.append(row | {"p_holm": p_values.get(name, np.nan)})
    return rows


def against(records: list[DomainSequence], reference: str) -> dict[str, float]:
    """{any other method: its p-value of forgetting against ``reference``, Holm-corrected}."""
    others = [name for name in dict.fromkeys(r.method for r in records) if name != reference]
    p_values = holm([p_value(records, name, reference, forgotten) for name in others])
    return dict(zip(others, p_values.tolist(), strict=True))


def order_effects_table(sequentials: list[DomainSequence], methods: Methods) -> Table | None:
    """What it changes to move the broad domain to the front, method by method."""
    rows = []
    for model in dict.fromkeys(record.model for record in sequentials):
        runs = by_method(sequentials, model, methods)
        found = {name: twins(records) for name, records in runs.items()}
        found = {name: effect for name, effect in found.items() if effect is not None}
        p_values = holm([effect.p for effect in found.values()]).tolist()
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
            | {"p_holm": p_holm}
            for (name, effect), p_holm in zip(found.items(), p_values, strict=True)
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
        "method, same replicate); difference first less later, negative where coming first lessens "
        f"forgetting [{OVER}]; p: paired t-test over replicates, Holm-corrected over methods."
    )
    return Table("order_effects", caption, data, [*headings, "p (Holm)"], cells)
