"""The table of the project's own method: beside the others, and its variants."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from steerlora.evaluation.records import DomainSequence
from steerlora.reporting.effects import Measure, select
from steerlora.reporting.methods import Methods
from steerlora.reporting.orders import against
from steerlora.reporting.sequences import by_replicate, final, forgotten, kept, ratio
from steerlora.reporting.tables import (
    ERROR,
    OVER,
    Cell,
    Table,
    interval_fields,
    interval_text,
    leaders,
    mean_and_error,
    mean_text,
    number,
    row_interval,
    row_of,
)

MOST_FORGETTING, LEAST_GENERAL, LEAST_FINAL = 0.2, 0.95, 2.0
"""The aims: forgetting as a share of LoRA's, general knowledge of the base's, score of LoRA's."""
LEAST_ORDERS, LEAST_REPLICATES = 4, 3
"""Over how much the aims ask to be measured."""


class Aim(NamedTuple):
    """One thing that the method is meant to reach."""

    text: str
    """What, in words."""
    measure: Measure | None
    """What it reached; None where it was not measured."""
    least: float = -np.inf
    """It is met where the whole interval is at least this,"""
    most: float = np.inf
    """and at most this."""

    @property
    def verdict(self) -> str:
        if self.measure is None or np.isnan(self.measure.interval.value):
            return "not measured"
        interval = self.measure.interval
        if not interval.known:
            return "undecided"
        return "met" if self.least <= interval.low and interval.high <= self.most else "not met"


def method_table(
    sequentials: list[DomainSequence], model: str, methods: Methods, *, meaningful: bool
) -> Table | None:
    """Forgetting, final average and general knowledge of all methods, against our own.

    Args:
        model: whose sequences are compared.
    """
    records = select(sequentials, model=model)
    names = methods.sorted(record.method for record in records)
    if methods.own not in names:
        return None
    p_values = against(records, methods.own)
    rows = [_row(records, name, methods) | {"p_holm": p_values.get(name)} for name in names]
    data = pd.DataFrame(rows)
    lowest, highest = (
        leaders(data, name, ["model"], meaningful=meaningful, lowest=name == "positive_forgetting")
        for name in ("positive_forgetting", "final_average")
    )
    cells = [
        row_of(
            methods.long_label(row.method),
            f"{row.orders} × {row.seeds}" if row.full else f"{row.runs} runs",
            Cell(mean_text(row, "positive_forgetting"), index in lowest),
            row_interval(row, "forgetting_ratio", 2),
            Cell(mean_text(row, "final_average"), index in highest),
            row_interval(row, "final_ratio", 2),
            row_interval(row, "general", 2),
            "" if row.method == methods.own else number(row.p_holm),
        )
        for index, row in data.iterrows()
    ]
    headings = ["Method", "Orders × replicates", "Positive forgetting", f"Of {methods.baseline}'s"]
    headings += ["Final average", f"Of {methods.baseline}'s", "General kept", "p (Holm)"]
    caption = (
        f"The project's own method on {model}, score: mean over replicates, of each the mean over "
        f"its orders, ± its standard error ({ERROR}); ratios to {methods.baseline}'s, and general "
        f"knowledge after the sequence as a share of the base model's [{OVER}]; p: paired t-test "
        f"of positive forgetting against {methods.own} over replicates, Holm-corrected over "
        "methods. The lower rows have one switch of it turned."
    )
    notes = [_sentence(aim) for aim in aims(records, methods)]
    notes.append(_breadth(*data[data.method == methods.own].iloc[0][["orders", "seeds"]]))
    return Table("method", caption, data, headings, cells, tuple(notes))


def _row(records: list[DomainSequence], method: str, methods: Methods) -> dict:
    own = select(records, method=method)
    orders, seeds = len({record.order for record in own}), len({record.seed for record in own})
    row = {
        "model": own[0].model,
        "method": method,
        "runs": len(own),
        "orders": orders,
        "seeds": seeds,
        "full": len(own) == orders * seeds,
    }
    for name, short, read in (
        ("positive_forgetting", "forgetting", forgotten),
        ("final_average", "final", final),
    ):
        row |= mean_and_error(name, list(by_replicate(own, read).values()))
        compared = method != methods.baseline
        share = ratio(records, method, methods.baseline, read) if compared else None
        row |= interval_fields(f"{short}_ratio", share)
    return row | interval_fields("general", kept(own))


def aims(records: list[DomainSequence], methods: Methods) -> tuple[Aim, ...]:
    """The three aims of the project's own method, and whether its intervals reach them.

    Args:
        records: sequences of one model.
    """
    forgetting, score = (
        ratio(records, methods.own, methods.baseline, read) for read in (forgotten, final)
    )
    return (
        Aim(
            f"Positive forgetting at most {MOST_FORGETTING} of {methods.baseline}'s",
            forgetting,
            most=MOST_FORGETTING,
        ),
        Aim(
            f"General knowledge after the sequence at least {LEAST_GENERAL} of the base model's",
            kept(select(records, method=methods.own)),
            least=LEAST_GENERAL,
        ),
        Aim(
            f"Final target average at least {LEAST_FINAL:g} times {methods.baseline}'s",
            score,
            least=LEAST_FINAL,
        ),
    )


def _sentence(aim: Aim) -> str:
    known = aim.verdict != "not measured"
    measured = f" ({interval_text(aim.measure.interval, 3)})" if known else ""
    return f"{aim.text}: {aim.verdict}{measured}."


def _breadth(orders: int, seeds: int) -> str:
    text = f"An aim is met where its whole interval is. Orders: {orders}, replicates: {seeds}"
    if orders < LEAST_ORDERS or seeds < LEAST_REPLICATES:
        text += f"; the aims ask for at least {LEAST_ORDERS} and {LEAST_REPLICATES}"
    return f"{text}."
