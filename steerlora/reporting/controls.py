"""The tables of controls: interventions on a trained method, and methods trained under one."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pandas as pd

from steerlora.evaluation.records import INTACT, Ablation, Evaluation
from steerlora.evaluation.scores import Score
from steerlora.evaluation.statistics import effect_size, holm, paired_test
from steerlora.reporting import labels
from steerlora.reporting.effects import ablated, drop, mean_of, retrained_drop, select
from steerlora.reporting.labels import in_order
from steerlora.reporting.tables import (
    ERROR,
    MISSING,
    OVER,
    Table,
    interval_fields,
    mean_and_error,
    mean_text,
    number,
    row_interval,
    row_of,
)


def ablation_table(ablations: list[Ablation]) -> Table | None:
    """Every intervention: score of every domain, and its drop from intact with an interval."""
    if not ablations:
        return None
    keys = list(dict.fromkeys((record.model, record.method) for record in ablations))
    rows = [row for key in keys for row in _ablation_rows(ablations, *key)]
    data = pd.DataFrame(rows)
    places = list(dict.fromkeys(data.domain))
    cells = []
    for (model, method, intervention), group in groupby(
        rows, key=lambda row: (row["model"], row["method"], row["intervention"])
    ):
        by_place = {row["domain"]: row for row in group}
        average = by_place["average"]
        texts = [f"{model} {method}"] if len(keys) > 1 else []
        texts += [intervention, *(_drop_text(by_place.get(place)) for place in places)]
        intact = intervention == INTACT
        texts += ["", ""] if intact else [number(average["d_z"], 2), number(average["p_holm"])]
        cells.append(row_of(*texts))
    seeds, items = int(data.seeds.max()), int(data[data.domain == "average"]["items"].max())
    who = "" if len(keys) > 1 else f" of {' '.join(keys[0])}"
    caption = (
        f"Causal ablation{who}: score under each intervention, drop from "
        f"intact in percent [{OVER}]; {seeds} replicates, "
        f"{items} items; d_z: mean drop of an item over the standard deviation of these drops "
        "(Cohen); p: paired t-test over replicates, Holm-corrected over interventions; "
        "both of the average."
    )
    headings = ["Model", "Intervention"] if len(keys) > 1 else ["Intervention"]
    return Table("ablation", caption, data, [*headings, *places, "d_z", "p (Holm)"], cells)


def _ablation_rows(ablations: list[Ablation], model: str, method: str) -> list[dict]:
    records = select(ablations, model=model, method=method)
    domains = records[0].domains
    names = in_order((n for r in records for n in r.interventions), labels.INTERVENTIONS)
    rows = []
    for name in names:
        for place, members in [("average", domains), *((d, [d]) for d in domains)]:
            found, scores = ablated(records, (INTACT, name), members)
            measure = drop(found, name, members) if name != INTACT else None
            row = {"model": model, "method": method, "intervention": name, "domain": place}
            row |= mean_and_error("score", [mean_of(changed) for _, changed in scores])
            row |= interval_fields("drop_percent", measure)
            row |= {"d_z": np.nan, "p_holm": np.nan, "seeds": len(found), "items": 0}
            if found:
                row["items"] = sum(score.items for score in scores[0][0])
            if measure is not None:
                row["d_z"] = _item_effect(scores)
                if place == "average":
                    row["p_holm"] = paired_test(measure.numerator)
            rows.append(row)
    for row, adjusted in zip(rows, holm([row["p_holm"] for row in rows]), strict=True):
        row["p_holm"] = float(adjusted)
    return rows


def _item_effect(scores: list[list[list[Score]]]) -> float:
    """d_z of the items' drops, means over replicates; NaN where items are not the same in all.

    Args:
        scores: of every replicate, the (intact, changed) scores by domain.
    """
    sides = []
    for side in (0, 1):
        runs = [[item for score in run[side] for item in score.per_item] for run in scores]
        sides.append(runs)
    if len({len(items) for runs in sides for items in runs}) != 1:
        return np.nan
    intact, changed = (np.mean(runs, axis=0) for runs in sides)
    return effect_size(changed, intact)


def _drop_text(row: dict | None) -> str:
    if row is None or row["score"] != row["score"]:
        return MISSING
    if row["drop_percent"] != row["drop_percent"]:
        return number(row["score"])
    return f"{number(row['score'])}, {row_interval(row, 'drop_percent', 1)}"


def retrained_table(
    retrained: list[Evaluation], evaluations: list[Evaluation], ablations: list[Ablation]
) -> Table | None:
    """Methods trained under an intervention, beside those that have it at evaluation only.

    Args:
        retrained: evaluations with ``phase`` "training".
        evaluations: those without any intervention.
        ablations: where the evaluation-time drop of the same intervention comes from.
    """
    rows = []
    for model, method in dict.fromkeys((r.model, r.method) for r in retrained):
        where = {"model": model, "method": method}
        own, intact = select(retrained, **where), select(evaluations, **where)
        ablated = select(ablations, **where)
        for name in in_order((r.intervention for r in own), labels.INTERVENTIONS):
            chosen = {record.seed: record for record in select(own, intervention=name)}
            after = retrained_drop(intact, chosen)
            before = drop(ablated, name)
            beside = [record for record in intact if record.seed in chosen]
            rows.append(
                where
                | {"intervention": name, "seeds": len(chosen)}
                | mean_and_error("intact", [r.averages.get("target") for r in beside])
                | mean_and_error("retrained", [r.averages.get("target") for r in chosen.values()])
                | interval_fields("retrained_drop_percent", after)
                | interval_fields("evaluation_drop_percent", before)
            )
    if not rows:
        return None
    data = pd.DataFrame(rows)
    cells = [
        row_of(
            f"{row.model} {row.method}",
            row.intervention,
            str(row.seeds),
            mean_text(row, "intact"),
            mean_text(row, "retrained"),
            row_interval(row, "retrained_drop_percent", 1),
            row_interval(row, "evaluation_drop_percent", 1),
        )
        for _, row in data.iterrows()
    ]
    headings = ["Model", "Intervention", "Replicates", "Intact", "Retrained"]
    headings += ["Drop, retrained", "Drop, at evaluation only"]
    caption = (
        "Retrained controls: target score of adapters trained and evaluated "
        "under an intervention, beside the intact adapter's, mean over replicates ± its standard "
        f"error ({ERROR}); drop from intact in percent [{OVER}], and that of "
        "the same intervention on the intact adapter at evaluation time. What a retrained adapter "
        "wins back, it does without the signal."
    )
    return Table("retrained", caption, data, headings, cells)
