"""The three tables of the paper: scale, ablation, forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pandas as pd

from steerlora.evaluation.forgetting import METRICS as FORGETTING
from steerlora.evaluation.forgetting import positive_forgetting, positive_forgetting_stderr
from steerlora.evaluation.statistics import combined_error, holm, paired_test, standard_error
from steerlora.reporting import labels
from steerlora.reporting.effects import (
    ablation_strata,
    drop,
    gain,
    instruction_first,
    ordered,
    reduction,
    select,
)
from steerlora.reporting.labels import adapter_label, in_order, score_label
from steerlora.reporting.tables import MISSING, Cell, Table, best_cells, interval_text, number


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
        row |= _mean_and_error(group, scores)
        if adapter != labels.BASE:
            measure = gain(evaluations, model, adapter, group)
            bounds = measure.interval if measure else (np.nan,) * 3
            row |= dict(
                zip(
                    (f"{group}_gain", f"{group}_gain_low", f"{group}_gain_high"),
                    bounds[:3],
                    strict=True,
                )
            )
    for domain in records[0]["domains"]:
        tasks = [record.get("target_tasks", {}).get(domain) for record in records]
        scores = [record["tasks"].get(task) for record, task in zip(records, tasks, strict=True)]
        row |= _mean_and_error(f"target_{domain}", scores)
    return row


def _mean_and_error(name: str, scores: Sequence[dict | None]) -> dict[str, float]:
    known = [score for score in scores if score is not None and score["value"] is not None]
    if not known:
        return {name: np.nan, f"{name}_stderr": np.nan}
    values = [score["value"] for score in known]
    errors = [score.get("stderr") or 0.0 for score in known]
    return {name: float(np.mean(values)), f"{name}_stderr": combined_error(values, errors)}


def ablation_table(ablations: list[dict]) -> Table | None:
    """Every intervention: score of every domain, and its drop from intact with an interval."""
    if not ablations:
        return None
    keys = list(dict.fromkeys((record["model"], record["adapter"]) for record in ablations))
    rows = [row for key in keys for row in _ablation_rows(ablations, *key)]
    data = pd.DataFrame(rows)
    places = list(dict.fromkeys(data.domain))
    cells = []
    for (model, adapter, intervention), group in groupby(
        rows, key=lambda row: (row["model"], row["adapter"], row["intervention"])
    ):
        by_place = {row["domain"]: row for row in group}
        average = by_place["average"]
        texts = [f"{model} {adapter}"] if len(keys) > 1 else []
        texts += [intervention, *(_drop_text(by_place.get(place)) for place in places)]
        texts.append("" if intervention == "intact" else number(average["p_holm"]))
        cells.append([Cell(text) for text in texts])
    seeds, items = int(data.seeds.max()), int(data[data.domain == "average"]["items"].max())
    who = "" if len(keys) > 1 else f" of {' '.join(keys[0])}"
    caption = (
        f"Causal ablation{who}: {score_label(ablations)} under each intervention, drop from "
        f"intact in percent [95 % bootstrap interval over items and seeds]; {seeds} seeds, "
        f"{items} items; p: paired permutation test over items, Holm-corrected over interventions."
    )
    headings = ["Model", "Intervention"] if len(keys) > 1 else ["Intervention"]
    return Table("ablation", caption, data, [*headings, *places, "p (Holm)"], cells)


def _ablation_rows(ablations: list[dict], model: str, adapter: str) -> list[dict]:
    records = select(ablations, model=model, adapter=adapter)
    domains = records[0]["domains"]
    names = in_order((n for r in records for n in r["interventions"]), labels.INTERVENTIONS)
    rows = []
    for name in names:
        for place, members in [("average", domains), *((d, [d]) for d in domains)]:
            scores = [_average(r["interventions"].get(name, {}), members) for r in records]
            measure = drop(records, name, members) if name != "intact" else None
            interval = measure.interval if measure else None
            strata = ablation_strata(records, name, members)
            rows.append(
                {"model": model, "adapter": adapter, "intervention": name, "domain": place}
                | _mean_and_error("score", scores)
                | {
                    "drop_percent": interval.value if interval else np.nan,
                    "drop_low": interval.low if interval else np.nan,
                    "drop_high": interval.high if interval else np.nan,
                    "p_holm": np.nan,
                    "seeds": sum(score is not None for score in scores),
                    "items": sum(s.baseline.shape[1] for s in strata) if strata else 0,
                }
            )
            if place == "average" and name != "intact" and strata is not None:
                rows[-1]["p_holm"] = paired_test(
                    *(np.concatenate([s[side].mean(axis=0) for s in strata]) for side in (0, 1))
                )
    tested = [row for row in rows if row["p_holm"] == row["p_holm"]]
    for row, adjusted in zip(tested, holm([row["p_holm"] for row in tested]), strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _average(scores: dict, domains: Sequence[str]) -> dict | None:
    """Mean over domains of the scores of one run, with its error; None unless all are there."""
    if not all(scores.get(domain) for domain in domains):
        return None
    errors = np.array([scores[domain].get("stderr") or 0.0 for domain in domains])
    return {
        "value": float(np.mean([scores[domain]["value"] for domain in domains])),
        "stderr": float(np.sqrt((errors**2).sum()) / len(errors)),
    }


def _drop_text(row: dict | None) -> str:
    if row is None or row["score"] != row["score"]:
        return MISSING
    if row["drop_percent"] != row["drop_percent"]:
        return number(row["score"])
    bounds = [row[key] for key in ("drop_percent", "drop_low", "drop_high")]
    return f"{number(row['score'])}, {interval_text(bounds, 1, ' %')}"


def forgetting_table(
    sequentials: list[dict], *, meaningful: bool, baseline: str = "lora"
) -> Table | None:
    """Every method and order, and order classes: forgetting, transfer, reduction against LoRA."""
    if not sequentials:
        return None
    keys = {
        "all": lambda r: True,
        "broad_first": instruction_first,
        "other": lambda r: not instruction_first(r),
    }
    rows = []
    for model in dict.fromkeys(record["model"] for record in sequentials):
        records = select(sequentials, model=model)
        orders = in_order((r["order"] for r in records), ("broad_first", "broad_last"))
        parts = [("class", name, keep) for name, keep in keys.items()]
        parts += [("order", o, lambda r, o=o: r["order"] == o) for o in orders]
        for kind, name, keep in parts:
            kept = [record for record in records if keep(record)]
            for adapter in in_order((record["adapter"] for record in kept), labels.ADAPTERS):
                where = {"model": model, "part": kind, "order": name, "adapter": adapter}
                rows.append(where | _forgetting_row(kept, adapter, baseline))
    data = pd.DataFrame(rows)
    best = {}
    for _, part in data.groupby(["model", "part", "order"], sort=False):
        lowest = best_cells(
            (-part.positive_forgetting).tolist(),
            part.positive_forgetting_stderr.tolist(),
            meaningful=meaningful,
        )
        best |= dict(zip(part.index, lowest, strict=True))
    cells = [
        [
            Cell(row.model),
            Cell(labels.ORDER_CLASSES[row.order] if row.part == "class" else row.order),
            Cell(adapter_label(row.adapter)),
            Cell(str(row.runs)),
            Cell(
                f"{number(row.positive_forgetting)} ± {number(row.positive_forgetting_stderr)}",
                best[row.Index],
            ),
            *(
                Cell(number(getattr(row, name), sign="transfer" in name))
                for name in list(labels.METRICS)[1:]
            ),
            Cell(
                interval_text(
                    (row.reduction_percent, row.reduction_low, row.reduction_high), 1, " %"
                )
            ),
        ]
        for row in data.itertuples()
    ]
    headings = ["Model", "Order", "Adapter", "Runs", *labels.METRICS.values()]
    caption = (
        f"Sequential adaptation, {score_label(sequentials)}: mean over runs (orders × seeds); "
        "± is the standard error from runs and items; the reduction of positive forgetting is "
        f"against {baseline}, in percent [95 % bootstrap interval over orders, seeds and items]."
    )
    headings.append(f"Reduction vs {baseline}")
    return Table("forgetting", caption, data, headings, cells)


def _forgetting_row(records: list[dict], adapter: str, baseline: str) -> dict:
    own = select(records, adapter=adapter)
    scored = [ordered(record) for record in own]
    metrics = {m.__name__: [m(scores) for scores, _ in scored] for m in FORGETTING}
    item_error = [positive_forgetting_stderr(*pair) for pair in scored]
    row: dict = {"runs": len(own), "seeds": len({record["seed"] for record in own})}
    for name, values in metrics.items():
        row |= {name: float(np.mean(values)), f"{name}_stderr": standard_error(values)}
    row["positive_forgetting_stderr"] = combined_error(
        metrics[positive_forgetting.__name__], item_error
    )
    measure = reduction(records, adapter, baseline) if adapter != baseline else None
    interval = measure.interval if measure else None
    return row | {
        "reduction_percent": interval.value if interval else np.nan,
        "reduction_low": interval.low if interval else np.nan,
        "reduction_high": interval.high if interval else np.nan,
    }
