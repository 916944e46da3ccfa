"""The figures of a report: scale, and controls. Others: `routing_figures`, `sequence_figures`.

Every function draws on a figure of its own and returns it, or None where its records are missing.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from steerlora.evaluation.records import BASE, INTACT, Ablation, Evaluation
from steerlora.reporting import labels
from steerlora.reporting.claim_measures import CLAIMS
from steerlora.reporting.drawing import PAPER, WIDTH, bars, name_ticks, panels
from steerlora.reporting.effects import dose_drops, drop, gain, select
from steerlora.reporting.labels import in_order
from steerlora.reporting.methods import Methods

SHAPES = "osD^v<>P*X"
"""Of domains, which have no colour: colours are those of methods."""
PAPER_GAINS = {"instruction_following": CLAIMS["C1"][1:], "general_knowledge": CLAIMS["C2"][1:]}


def scale_gains(evaluations: list[Evaluation], _: str, methods: Methods) -> Figure | None:
    """Gain over the base model by task group, model (all of them) and method, with intervals."""
    models = list(dict.fromkeys(record.model for record in evaluations))
    names = [name for name in methods.sorted(r.method for r in evaluations) if name != BASE]
    gains = {
        group: [[gain(evaluations, model, name, group) for model in models] for name in names]
        for group in labels.GROUPS
    }
    groups = [group for group, found in gains.items() if any(map(any, found))]
    if not groups:
        return None
    figure = Figure(figsize=(WIDTH, 3.2))
    # One scale for the general groups, so that a tiny gain looks tiny; the target domains,
    # which were trained on, would dwarf them and have their own.
    for place, group in enumerate(groups, start=1):
        shared = figure.axes[0] if figure.axes and group != "target" else None
        axis = figure.add_subplot(1, len(groups), place, sharey=shared)
        axis.tick_params(labelleft=shared is None)
        for index, name in enumerate(names):
            bounds = [m.interval[:3] if m else (np.nan,) * 3 for m in gains[group][index]]
            bars(axis, bounds, index, len(names), name, methods.colour(name))
        if group in PAPER_GAINS:
            axis.axhspan(*PAPER_GAINS[group], color=PAPER, zorder=0, label="paper's range")
        axis.set_title(labels.group_label(group, evaluations))
        name_ticks(axis, models, rotate=len(models) > 2)
        axis.axhline(0, color="black", linewidth=0.8)
    figure.axes[0].set_ylabel("gain over base")
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(len(texts), 5))
    return figure


def ablation(ablations: list[Ablation], model: str, methods: Methods) -> Figure | None:
    """Drop of the mean target score under every intervention; small marks are the domains."""
    records = select(ablations, model=model, method=methods.paper)
    names = in_order((n for r in records for n in r.interventions), labels.INTERVENTIONS)
    measures = {name: drop(records, name) for name in names if name != INTACT}
    shown = {name: measure for name, measure in measures.items() if measure is not None}
    if not shown:
        return None
    axis = Figure(figsize=(WIDTH, 4.0)).subplots()
    cut = {"alpha": 0.6, "zorder": 0, "label": "paper: SAE-signal controls"}
    axis.axhspan(*CLAIMS["C4"][1:], color=PAPER, **cut)
    axis.axhline(CLAIMS["C5"].high, color="#777777", linestyle="--", label="paper: fixed_rank")
    bounds = [measure.interval[:3] for measure in shown.values()]
    bars(axis, bounds, 0, 1, "mean over domains", methods.colour(methods.paper))
    domains = records[0].domains
    for index, domain in enumerate(domains):
        drops = [drop(records, name, [domain]) for name in shown]
        values = [measure.interval.value if measure else np.nan for measure in drops]
        places = np.arange(len(shown)) + 0.09 * (index - (len(domains) - 1) / 2)
        look = {"color": "white", "markeredgecolor": "black", "markeredgewidth": 0.8}
        look |= {"linestyle": "none", "markersize": 4.5, "zorder": 4}
        axis.plot(places, values, marker=SHAPES[index % len(SHAPES)], label=domain, **look)
    name_ticks(axis, list(shown), rotate=len(shown) > 5)
    axis.axhline(0, color="black", linewidth=0.8)
    title = f"{methods.paper} on {model}: score lost under interventions"
    axis.set(ylabel="drop from intact (%)", title=title)
    axis.figure.legend(loc="outside right upper")
    return axis.figure


def dose_response(ablations: list[Ablation], model: str, methods: Methods) -> Figure | None:
    """Drop of the mean target score by strength of an intervention: a panel each, others in grey.

    Strength 0 is the method as trained, 1 the intervention in full.
    """
    records = select(ablations, model=model, method=methods.paper)
    curves = {}
    for name in in_order((n for r in records for n in r.doses), labels.INTERVENTIONS):
        found = dose_drops(records, name) | {1.0: drop(records, name)}
        known = [(at, *m.interval[:3]) for at, m in found.items() if m is not None]
        # No strength, no change: the intact scores themselves.
        curves[name] = np.array([(0.0, 0.0, 0.0, 0.0), *known]).T
    if not curves:
        return None
    figure, axes = panels(len(curves), columns=4, height=2.2, sharex=True, sharey=True)
    colour = methods.colour(methods.paper)
    for axis, name in zip(axes, curves, strict=True):
        for other, (at, value, _, _) in curves.items():
            if other != name:
                axis.plot(at, value, color=PAPER, linewidth=0.8, zorder=1)
        at, value, low, high = curves[name]
        axis.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.plot(at, value, "o-", color=colour, markersize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(name)
        axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axis.grid(axis="y")
    figure.supxlabel("strength of the intervention", fontsize=10)
    figure.supylabel("drop from intact (%)", fontsize=10)
    figure.suptitle(f"{methods.paper} on {model}: score lost", fontsize=10)
    return figure
