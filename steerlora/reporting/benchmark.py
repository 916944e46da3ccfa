"""The table of the continual benchmark: what the field reports, beside what it has published."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from steerlora.evaluation.forgetting import (
    backward_transfer,
    chaudhry_forgetting,
    final_average,
    forward_transfer,
    just_trained,
    score_matrix,
)
from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.scores import Estimate
from steerlora.reporting.effects import select
from steerlora.reporting.methods import Methods
from steerlora.reporting.published_figures import OURS, published
from steerlora.reporting.sequences import by_replicate, ordered
from steerlora.reporting.tables import (
    ERROR,
    MISSING,
    Cell,
    Table,
    leaders,
    mean_and_error,
    number,
    row_of,
)

ALL = "all orders"
COLUMNS = {
    "AP": final_average,
    "BWT": backward_transfer,
    "FT": chaudhry_forgetting,
    "FWT": forward_transfer,
    "just trained": just_trained,
}
"""What the field calls the metrics that are shown."""
WRITTEN = {f"{name} written": COLUMNS[name] for name in ("AP", "BWT")}
"""Those shown of answers that are written out."""


def benchmark_table(
    sequentials: list[DomainSequence], methods: Methods, *, meaningful: bool
) -> Table | None:
    """Every method by order on tasks that are ranked and written out; None where none are."""
    records = [record for record in sequentials if record.written]
    if not records:
        return None
    rows = []
    for model in dict.fromkeys(record.model for record in records):
        of_model = select(records, model=model)
        orders = list(dict.fromkeys(record.order for record in of_model))
        for order in [ALL, *orders] if len(orders) > 1 else orders:
            chosen = [record for record in of_model if order in (ALL, record.order)]
            for method in methods.sorted(record.method for record in chosen):
                own = select(chosen, method=method)
                rows.append({"model": model, "order": order, "method": method} | _figures(own))
    data = pd.DataFrame(rows)
    best = leaders(data, "AP", ["model", "order"], meaningful=meaningful)
    known = published(frozenset(records[0].sequence))
    cells = [
        row_of(
            row.model,
            row.order,
            methods.label(row.method),
            str(row.runs),
            *(
                Cell(_points(row, name), index in best and name == "AP")
                for name in (*COLUMNS, *WRITTEN)
            ),
            known.get(OURS.get(row.method, ""), MISSING),
        )
        for index, row in data.iterrows()
    ]
    figures = len(COLUMNS) + len(WRITTEN)
    theirs = [name for name in known if name not in {OURS.get(m) for m in data.method}]
    cells += [
        row_of(MISSING, MISSING, name, *[MISSING] * (figures + 1), known[name]) for name in theirs
    ]
    headings = ["Model", "Order", "Method", "Runs", *COLUMNS, *WRITTEN]
    caption = (
        "The continual benchmark, in points: AP, mean score after the last task; BWT, mean of what "
        "a task changes after its own stage; FT, mean loss since its best; FWT, what earlier tasks "
        "add to the base's score; just trained, mean score as each stage ends. Labels are ranked "
        "by likelihood; written: the answer is written out and counts where it is the label. Means "
        f"over replicates ± standard error ({ERROR})."
    )
    notes = ()
    if known:
        headings.append("Published AP / BWT (model; source)")
        notes = (
            "Published figures are of other base models and training sizes than ours unless the "
            "model says otherwise, of written answers, and second hand: read in the work that is "
            "named. They are no comparison, but say what the field reports.",
        )
    else:
        cells = [row[:-1] for row in cells]
    return Table("continual", caption, data, headings, cells, notes)


def _figures(records: list[DomainSequence]) -> dict[str, float]:
    """The row of one method's runs."""
    row: dict[str, float] = {"runs": len(records)}
    for columns, read in ((COLUMNS, _ranked), (WRITTEN, _written)):
        for name, metric in columns.items():
            found = by_replicate(records, lambda r, m=metric, read=read: _estimate(m, read(r)))
            row |= mean_and_error(name, list(found.values()))
    return row


def _estimate(metric: Callable[[np.ndarray], float], scores: np.ndarray) -> Estimate:
    return Estimate(100 * metric(scores), np.nan)


def _ranked(record: DomainSequence) -> np.ndarray:
    return ordered(record)[0]


def _written(record: DomainSequence) -> np.ndarray:
    return score_matrix(record.written, sequence=record.sequence, domains=record.domains)


def _points(row: pd.Series, name: str) -> str:
    signed = name.startswith(("BWT", "FWT"))
    text, error = number(row[name], 1, sign=signed), number(row[f"{name}_stderr"], 1)
    return text if MISSING in (text, error) else f"{text} ± {error}"
