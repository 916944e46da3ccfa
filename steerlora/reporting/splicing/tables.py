"""Tables of an experiment on SAEs in place of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from steerlora.evaluation.splicing import ADAPTER, BASE, METHOD, SAES, WAYS, Splicing
from steerlora.evaluation.statistics import t_interval
from steerlora.reporting.splicing.shares import Study
from steerlora.reporting.tables import MISSING, OVER, Table, interval_text, number, row_of

FIGURES: dict[str, tuple[int, Callable[[Splicing], float]]] = {
    "Loss": (4, lambda one: one.loss(METHOD)),
    "SAEs alone": (4, lambda one: one.loss(SAES)),
    "Base": (4, lambda one: one.loss(BASE)),
    "KL": (4, lambda one: one.kl(METHOD)),
    "Harm": (4, lambda one: one.loss(ADAPTER) - one.loss(BASE)),
    "L0": (1, lambda one: _mean(found.l0 for found in one.latents[METHOD].values())),
    "Alive": (2, lambda one: _mean(found.alive for found in one.latents[METHOD].values())),
    "Parameters": (0, lambda one: float(one.parameters)),
    "Tokens": (0, lambda one: one.cost.tokens),
    "GFLOPs": (1, lambda one: one.cost.flops / 1e9),
    "Seconds": (1, lambda one: one.cost.seconds),
}
"""{column: (digits, figure of a record)}; of several replicates the mean is shown."""


def _mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)


def shares_table(study: Study) -> Table | None:
    """Every condition: the share of the gap that it closes, and what it costs."""
    rows, shown = [], []
    for condition, found in study.records.items():
        shares = study.shares(condition)
        low = high = value = float("nan")
        measure = study.measure(condition, condition)
        if measure is not None:
            value, low, high = measure.interval[:3]
        if len(shares) == 1:  # over rows, since there is one replicate
            ((share),) = shares.values()
            low, high = 100 * share.low, 100 * share.high
        row: dict[str, Any] = {"condition": condition, "replicates": len(found)}
        row |= {"share_percent": value, "share_low": low, "share_high": high}
        cells = [condition.replace("_", " "), interval_text((value, low, high), 1, " %")]
        for name, (digits, figure) in FIGURES.items():
            mean = _mean(figure(record) for record in found.values())
            row[name.lower().replace(" ", "_")] = mean
            cells.append(number(mean, digits))
        rows.append(row)
        shown.append(row_of(*cells, str(len(found))))
    if not rows:
        return None
    small = study.too_small()
    notes = (f"Gaps below five standard errors have no share: {', '.join(small)}.",)
    return Table(
        "shares",
        "Share of the gap in cross-entropy that each condition closes, with its "
        f"{OVER}, of one replicate over rows. Loss: with SAEs and what was trained; harm: loss of "
        "what was trained without the SAEs, less the base's; all in nats a token of general text. "
        "L0 and live latents are of the adapted model. Tokens, FLOPs and seconds: of what was "
        "trained around the SAEs, or of their training end to end.",
        pd.DataFrame(rows),
        ["Condition", "Share closed", *FIGURES, "Replicates"],
        shown,
        notes if small else (),
    )


def streams_table(study: Study) -> Table | None:
    """How far each layer's stream is from the base's, with the SAEs alone and with the method."""
    rows, shown = [], []
    for condition, found in study.records.items():
        layers = sorted({layer for one in found.values() for layer in one.streams[METHOD]})
        for layer in layers:
            row: dict[str, Any] = {"condition": condition, "layer": layer}
            cells = [condition.replace("_", " "), str(layer)]
            for way in (SAES, METHOD):
                for name in ("distance", "cosine"):
                    interval = t_interval(
                        [getattr(one.streams[way][layer], name) for one in found.values()]
                    )
                    row[f"{name}_{way}"] = interval.value
                    cells.append(interval_text(interval, 3))
            rows.append(row)
            shown.append(row_of(*cells))
    if not rows:
        return None
    return Table(
        "streams",
        "The stream that enters each layer, before any SAE there, beside the base's: mean distance "
        f"over the base's mean norm, and mean cosine; {OVER}.",
        pd.DataFrame(rows),
        ["Condition", "Layer", "Distance, SAEs", "Cosine", "Distance, method", "Cosine"],
        shown,
    )


def scores_table(study: Study) -> Table | None:
    """General tasks, in every way to run the model."""
    rows, shown = [], []
    for condition, found in study.records.items():
        tasks = sorted({task for one in found.values() for task in one.scores.get(BASE, {})})
        for task in tasks:
            row: dict[str, Any] = {"condition": condition, "task": task}
            cells = [condition.replace("_", " "), task]
            for way in WAYS:
                values = [one.scores[way][task].value for one in found.values() if one.scores]
                interval = t_interval(values)
                row[way] = interval.value
                cells.append(interval_text(interval, 3) if values else MISSING)
            rows.append(row)
            shown.append(row_of(*cells))
    if not rows:
        return None
    return Table(
        "scores",
        "Scores of general tasks: the base, with the SAEs alone, with the SAEs and what was "
        f"trained, and with what was trained alone; {OVER}.",
        pd.DataFrame(rows),
        ["Condition", "Task", "Base", "SAEs", "SAEs and method", "Method alone"],
        shown,
    )
