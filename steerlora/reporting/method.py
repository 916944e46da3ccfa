"""The table of the project's own method: beside the others, and with each switch turned."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from steerlora.evaluation.statistics import Interval
from steerlora.reporting import labels
from steerlora.reporting.effects import select
from steerlora.reporting.labels import METHOD, in_order, score_label, switch_of
from steerlora.reporting.orders import BASELINE, corrected
from steerlora.reporting.sequences import final, forgotten, kept, p_value, ratio
from steerlora.reporting.tables import (
    Cell,
    Table,
    best_cells,
    interval_fields,
    interval_text,
    mean_and_error,
    number,
    plus_minus,
)

MOST_FORGETTING, LEAST_GENERAL, LEAST_FINAL = 0.2, 0.95, 2.0
"""The aims: forgetting as a share of LoRA's, general knowledge of the base's, score of LoRA's."""
LEAST_ORDERS, LEAST_SEEDS = 4, 3
"""What the aims are to be judged over."""


class Aim(NamedTuple):
    """One thing that the method is meant to reach.

    Attributes:
        text: what.
        interval: what it reached; None where it was not measured.
        verdict: "met" where the whole interval is, else "not met"; or "not measured".
    """

    text: str
    interval: Interval | None
    verdict: str


def shown_methods(sequentials: list[dict]) -> list[str]:
    """The adapters of some records in the order of a report."""
    return in_order((record["adapter"] for record in sequentials), labels.ADAPTERS)


def method_table(sequentials: list[dict], model: str, *, meaningful: bool) -> Table | None:
    """Forgetting, final average and general knowledge of all methods, against our own.

    Args:
        model: whose sequences are compared.
    """
    records = select(sequentials, model=model)
    methods = shown_methods(records)
    if METHOD not in methods:
        return None
    others = [name for name in methods if name != METHOD]
    p_values = corrected({name: p_value(records, METHOD, name, forgotten) for name in others})
    data = pd.DataFrame(
        [
            {"model": model} | _row(records, name) | {"p_holm": p_values.get(name)}
            for name in methods
        ]
    )
    lowest, highest = (
        best_cells(
            (sign * data[name]).tolist(), data[f"{name}_stderr"].tolist(), meaningful=meaningful
        )
        for sign, name in ((-1, "positive_forgetting"), (1, "final_average"))
    )
    cells = [
        [
            Cell(f"{METHOD}: {switch_of(row.adapter)}" if switch_of(row.adapter) else row.adapter),
            Cell(f"{row.orders} × {row.seeds}" if row.full else f"{row.runs} runs"),
            Cell(
                plus_minus(row.positive_forgetting, row.positive_forgetting_stderr),
                lowest[row.Index],
            ),
            Cell(_bounds(row, "forgetting_ratio")),
            Cell(plus_minus(row.final_average, row.final_average_stderr), highest[row.Index]),
            Cell(_bounds(row, "final_ratio")),
            Cell(_bounds(row, "general")),
            Cell("" if row.adapter == METHOD else number(row.p_holm)),
        ]
        for row in data.itertuples()
    ]
    headings = ["Method", "Orders × seeds", "Positive forgetting", f"Of {BASELINE}'s"]
    headings += ["Final average", f"Of {BASELINE}'s", "General kept", "p (Holm)"]
    caption = (
        f"The project's own method on {model}, {score_label(records)}: mean over orders and seeds "
        f"± standard error from runs and items; ratios to {BASELINE}'s, and general knowledge "
        "after the sequence as a share of the base model's [95 % bootstrap intervals over orders, "
        f"seeds and items]; p: paired permutation test of positive forgetting against {METHOD} "
        "over runs, Holm-corrected over methods. The lower rows have one switch of it turned."
    )
    notes = tuple(_sentence(aim) for aim in aims(records))
    return Table("method", caption, data, headings, cells, (*notes, _breadth(records)))


def _row(records: list[dict], adapter: str) -> dict:
    own = select(records, adapter=adapter)
    orders, seeds = (len({record[key] for record in own}) for key in ("order", "seed"))
    row = {
        "adapter": adapter,
        "runs": len(own),
        "orders": orders,
        "seeds": seeds,
        "full": len(own) == orders * seeds,
    }
    for name, short, read in (
        ("positive_forgetting", "forgetting", forgotten),
        ("final_average", "final", final),
    ):
        row |= mean_and_error(name, [read(record)._asdict() for record in own])
        measure = ratio(records, adapter, BASELINE, read) if adapter != BASELINE else None
        row |= interval_fields(f"{short}_ratio", measure and measure.interval)
    return row | interval_fields("general", kept(own))


def _bounds(row, name: str) -> str:
    return interval_text([getattr(row, f"{name}{end}") for end in ("", "_low", "_high")], 2)


def aims(records: list[dict]) -> tuple[Aim, ...]:
    """The three aims of the method, judged by intervals.

    Args:
        records: sequences of one model.
    """
    forgetting, score = (ratio(records, METHOD, BASELINE, read) for read in (forgotten, final))
    return (
        _judged(
            f"Positive forgetting at most {MOST_FORGETTING} of {BASELINE}'s",
            forgetting and forgetting.interval,
            lambda interval: interval.high <= MOST_FORGETTING,
        ),
        _judged(
            f"General knowledge after the sequence at least {LEAST_GENERAL} of the base model's",
            kept(select(records, adapter=METHOD)),
            lambda interval: interval.low >= LEAST_GENERAL,
        ),
        _judged(
            f"Final target average at least {LEAST_FINAL:g} times {BASELINE}'s",
            score and score.interval,
            lambda interval: interval.low >= LEAST_FINAL,
        ),
    )


def _judged(text: str, interval: Interval | None, met: Callable[[Interval], bool]) -> Aim:
    if interval is None or not interval.known:
        return Aim(text, interval, "not measured")
    return Aim(text, interval, "met" if met(interval) else "not met")


def _sentence(aim: Aim) -> str:
    known = aim.interval is not None and aim.interval.value == aim.interval.value
    measured = f" ({interval_text(aim.interval, 3)})" if known else ""
    return f"{aim.text}: {aim.verdict}{measured}."


def _breadth(records: list[dict]) -> str:
    own = select(records, adapter=METHOD)
    orders, seeds = (len({record[key] for record in own}) for key in ("order", "seed"))
    text = f"An aim is met where its whole interval is. Orders: {orders}, seeds: {seeds}"
    if orders < LEAST_ORDERS or seeds < LEAST_SEEDS:
        text += f"; the aims ask for at least {LEAST_ORDERS} and {LEAST_SEEDS}"
    return f"{text}."
