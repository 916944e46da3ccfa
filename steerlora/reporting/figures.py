"""The figures of a report.

Every function draws on a figure of its own and returns it, or None where its records are missing;
`steerlora.reporting.drawing.save` writes it.
"""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerlora.reporting import labels
from steerlora.reporting.drawing import COLOURS, PAPER, STYLE, WIDTH, bars, heat_map, name_ticks
from steerlora.reporting.effects import drop, gain, ordered, select
from steerlora.reporting.labels import in_order, score_label

MAX_ORDERS = 4
"""Orders in one figure; more would not be readable."""

PAPER_GAINS = {"instruction_following": (0.016, 0.052), "general_knowledge": (0.017, 0.023)}


def scale_gains(evaluations: list[dict]) -> Figure | None:
    """Gain over the base model by task group, model and adapter, with intervals."""
    models = list(dict.fromkeys(record["model"] for record in evaluations))
    adapters = [
        adapter
        for adapter in in_order((r["adapter"] for r in evaluations), labels.ADAPTERS)
        if adapter != labels.BASE
    ]
    measures = {
        (group, adapter, model): gain(evaluations, model, adapter, group)
        for group in labels.GROUPS
        for adapter in adapters
        for model in models
    }
    groups = [
        group
        for group in labels.GROUPS
        if any(measure for key, measure in measures.items() if key[0] == group)
    ]
    if not groups:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        # One scale for the general groups, so that a tiny gain looks tiny; the target domains,
        # which were trained on, would dwarf them and have their own.
        axes: list[Axes] = []
        for place, group in enumerate(groups, start=1):
            shared = axes[0] if axes and group != "target" else None
            axes.append(figure.add_subplot(1, len(groups), place, sharey=shared))
            axes[-1].tick_params(labelleft=shared is None)
        for axis, group in zip(axes, groups, strict=True):
            for index, adapter in enumerate(adapters):
                found = [measures[group, adapter, model] for model in models]
                bounds = [m.interval[:3] if m else (np.nan,) * 3 for m in found]
                bars(axis, bounds, index, len(adapters), adapter)
            if group in PAPER_GAINS:
                axis.axhspan(*PAPER_GAINS[group], color=PAPER, zorder=0, label="paper's range")
            axis.set_title(labels.GROUPS[group])
            name_ticks(axis, models, rotate=len(models) > 2)
            axis.axhline(0, color="black", linewidth=0.8)
        axes[0].set_ylabel("gain over base")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


def ablation_bars(ablations: list[dict], model: str, adapter: str) -> Figure | None:
    """Drop of the mean target score under every intervention; dots are the domains."""
    records = select(ablations, model=model, adapter=adapter)
    if not records:
        return None
    domains = records[0]["domains"]
    names = in_order((n for r in records for n in r["interventions"]), labels.INTERVENTIONS)
    measures = {name: drop(records, name, domains) for name in names if name != "intact"}
    shown = [name for name, measure in measures.items() if measure is not None]
    if not shown:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0))
        axis = figure.subplots()
        axis.axhspan(
            33.6, 65.6, color=PAPER, alpha=0.6, zorder=0, label="paper: SAE-signal controls"
        )
        axis.axhline(11.8, color="#777777", linestyle="--", label="paper: fixed_rank")
        bars(axis, [measures[name].interval[:3] for name in shown], 0, 1, "mean over domains")
        for index, domain in enumerate(domains):
            drops = [drop(records, name, [domain]) for name in shown]
            places = np.arange(len(shown)) + 0.09 * (index - (len(domains) - 1) / 2)
            axis.plot(
                places,
                [measure.interval.value if measure else np.nan for measure in drops],
                linestyle="none",
                marker="o",
                markersize=4,
                markeredgecolor="white",
                markeredgewidth=0.5,
                color=COLOURS[1 + index % 5],
                label=domain,
            )
        name_ticks(axis, shown, rotate=len(shown) > 5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel("drop from intact (%)")
        axis.set_title(f"{adapter} on {model}: {score_label(records)} lost under interventions")
        figure.legend(loc="outside right upper")
    return figure


def forgetting_matrices(sequentials: list[dict], model: str) -> Figure | None:
    """Scores after every stage: a row of heat maps a method, a column an order, seed means.

    Domains run in the order of learning, left to right, so stage i learns column i. At
    most `MAX_ORDERS` orders are drawn.
    """
    records = select(sequentials, model=model)
    if not records:
        return None
    adapters = in_order((record["adapter"] for record in records), labels.ADAPTERS)
    orders = in_order((record["order"] for record in records), ("broad_first", "broad_last"))
    orders = orders[:MAX_ORDERS]
    matrices = [
        np.mean(
            [ordered(r)[0] for r in select(records, adapter=adapter, order=order)] or [[[0]]],
            axis=0,
        )
        for adapter in adapters
        for order in orders
    ]
    low, high = min(m.min() for m in matrices), max(m.max() for m in matrices)
    with rc_context(STYLE):
        width = min(WIDTH, 1.4 + 3.0 * len(orders))
        figure = Figure(figsize=(width, 0.5 + 2.75 * len(adapters)))
        axes = figure.subplots(len(adapters), len(orders), squeeze=False)
        for row, adapter in enumerate(adapters):
            for column, order in enumerate(orders):
                axis = axes[row, column]
                found = select(records, adapter=adapter, order=order)
                if not found:
                    axis.axis("off")
                    continue
                sequence = found[0]["sequence"]
                stages = ["base", *map(str, range(1, len(sequence) + 1))]
                image = heat_map(
                    axis,
                    matrices[row * len(orders) + column],
                    stages if column == 0 else None,
                    sequence,
                    low,
                    high,
                    size=7,
                )
                axis.set_title(f"{labels.adapter_label(adapter)}, {order}")
                axis.tick_params(labelsize=8)
                axis.tick_params(axis="x", rotation=90)
                if column == 0:
                    axis.set_ylabel("after stage")
        figure.colorbar(image, ax=axes, label=score_label(records), shrink=0.8, aspect=30)
    return figure


def gate_by_domain(evaluations: list[dict], model: str) -> Figure | None:
    """Mean gate of every domain on every specialist, one heat map an adapter, side by side.

    One seed: specialists have no identity across seeds, so an average over them shows nothing.
    """
    found = _routed(evaluations, model)
    if not found:
        return None
    adapters = list(found)
    with rc_context(STYLE):
        figure = Figure(figsize=(min(WIDTH, 1.8 + 3.4 * len(adapters)), 3.2))
        axes = figure.subplots(1, len(adapters), squeeze=False)[0]
        for index, (axis, adapter) in enumerate(zip(axes, adapters, strict=True)):
            record = found[adapter][0]
            gates = record["routing"]["gate_by_domain"]
            values = np.array(list(gates.values()))
            image = heat_map(
                axis,
                values,
                list(gates) if index == 0 else None,
                list(map(str, range(values.shape[1]))),
                0.0,
                1.0,
                size=9,
            )
            axis.set_xlabel("specialist")
            axis.set_title(
                f"{adapter} (seed {record['seed']})\nmutual information "
                f"{record['routing']['mutual_information']:.2f}, by chance "
                f"{record['routing']['mutual_information_null']:.2f}"
            )
        figure.colorbar(image, ax=axes, label="mean gate")
    return figure


def rank_by_domain(evaluations: list[dict], model: str) -> Figure | None:
    """Mean token rank (sum of the rank mask) by domain and adapter; dots are seeds."""
    found = _routed(evaluations, model)
    if not found:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.2))
        axis = figure.subplots()
        domains = list(next(iter(found.values()))[0]["routing"]["rank_by_domain"])
        for index, (adapter, records) in enumerate(found.items()):
            ranks = np.array(
                [[r["routing"]["rank_by_domain"].get(d, np.nan) for d in domains] for r in records]
            )
            means = ranks.mean(axis=0)
            bounds = [(mean, np.nan, np.nan) for mean in means]
            places = bars(axis, bounds, index, len(found), adapter)
            for seed in ranks:
                axis.plot(places, seed, "o", color="black", markersize=3, alpha=0.7)
        name_ticks(axis, domains)
        axis.set_ylabel("mean token rank")
        axis.set_title(f"Effective rank by domain, {model} (dots: seeds)")
        figure.legend(loc="outside right upper")
    return figure


def _routed(evaluations: list[dict], model: str) -> dict[str, list[dict]]:
    """Evaluations of a model that carry routing health, by adapter; our method first."""
    records = [record for record in select(evaluations, model=model) if record.get("routing")]
    adapters = in_order((record["adapter"] for record in records), ("sc_lora", "moe_lora"))
    return {adapter: select(records, adapter=adapter) for adapter in adapters}
