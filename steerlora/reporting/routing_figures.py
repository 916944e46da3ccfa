"""The figures of routing: who is routed where, at what rank, and how that came about in training.

Every function draws on a figure of its own and returns it, or None where its records are missing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from steerlora.evaluation.records import Evaluation
from steerlora.reporting.drawing import WIDTH, bars, heat_map, name_ticks, panels
from steerlora.reporting.health import routed
from steerlora.reporting.methods import Methods


def gate_by_domain(evaluations: list[Evaluation], model: str, methods: Methods) -> Figure | None:
    """Mean gate of every domain on every specialist, a heat map a method.

    One replicate: specialists have no identity across replicates, so an average over them shows
    nothing.
    """
    found = routed(evaluations, model, methods)
    if not found:
        return None
    figure, axes = panels(len(found), columns=3, height=2.7)
    for axis, (method, records) in zip(axes, found.items(), strict=True):
        health = records[0].routing
        gates = health.gate_by_domain
        values = np.array(list(gates.values()))
        specialists = list(map(str, range(values.shape[1])))
        image = heat_map(axis, values, list(gates), specialists, 0.0, 1.0, size=8)
        axis.set_xlabel("specialist")
        axis.tick_params(labelsize=9)
        title = f"{method} (replicate {records[0].seed})\nmutual information "
        title += f"{health.mutual_information:.2f}, chance {health.mutual_information_null:.2f}"
        axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="mean gate", aspect=30)
    return figure


def rank_by_domain(evaluations: list[Evaluation], model: str, methods: Methods) -> Figure | None:
    """Mean token rank (sum of the rank mask) by domain and method; dots are replicates."""
    found = routed(evaluations, model, methods)
    if not found:
        return None
    axis = Figure(figsize=(7.0, 3.2)).subplots()
    domains = list(next(iter(found.values()))[0].routing.rank_by_domain)
    for index, (method, records) in enumerate(found.items()):
        ranks = pd.DataFrame([record.routing.rank_by_domain for record in records])
        ranks = ranks.reindex(columns=domains).to_numpy()
        bounds = [(mean, np.nan, np.nan) for mean in ranks.mean(axis=0)]
        places = bars(axis, bounds, index, len(found), method, methods.colour(method))
        axis.plot(places, ranks.T, "o", color="black", markersize=3, alpha=0.7, zorder=4)
    name_ticks(axis, domains)
    axis.set(
        ylabel="mean token rank", title=f"Effective rank by domain, {model} (dots: replicates)"
    )
    axis.figure.legend(loc="outside right upper")
    return axis.figure


def rank_by_layer(evaluations: list[Evaluation], model: str, methods: Methods) -> Figure | None:
    """Mean token rank by domain and control site, means of replicates, a heat map a
    method.

    Of methods with several sites only: one site is what `rank_by_domain` shows.
    """
    ranks = {}
    for method, records in routed(evaluations, model, methods).items():
        if all(len(record.routing_by_site) > 1 for record in records):
            runs = [
                pd.DataFrame({s: at.rank_by_domain for s, at in record.routing_by_site.items()})
                for record in records
            ]
            ranks[method] = (sum(runs) / len(runs)).reindex(runs[0].index).sort_index(axis=1)
    if not ranks:
        return None
    everything = np.concatenate([mean.to_numpy().ravel() for mean in ranks.values()])
    low, high = everything.min(), everything.max()
    figure, axes = panels(len(ranks), columns=2, height=2.6)
    for axis, (method, mean) in zip(axes, ranks.items(), strict=True):
        sites = list(map(str, mean.columns))
        values = mean.to_numpy()
        image = heat_map(axis, values, list(mean.index), sites, low, high, size=8, digits=1)
        axis.set(xlabel="control site (layer)", title=method)
    figure.colorbar(image, ax=axes, label="mean token rank", aspect=30)
    return figure


def routing_over_time(evaluations: list[Evaluation], model: str, methods: Methods) -> Figure | None:
    """Usage entropy over the steps of training: means over replicates, and each, faint."""
    found = {
        method: [r.routing_history for r in records if r.routing_history]
        for method, records in routed(evaluations, model, methods).items()
    }
    found = {method: histories for method, histories in found.items() if histories}
    if not found:
        return None
    axis = Figure(figsize=(WIDTH, 3.4)).subplots()
    for method, histories in found.items():
        colour = methods.colour(method)
        runs = [pd.Series({at.step: at.usage_entropy for at in history}) for history in histories]
        for run in runs:
            axis.plot(run.index, run, color=colour, alpha=0.35, lw=0.8)
        mean = pd.concat(runs, axis=1).sort_index().mean(axis=1)
        axis.plot(mean.index, mean, color=colour, lw=2, label=method)
    axis.grid(axis="y")
    title = f"How evenly specialists are used in training, {model} (faint: replicates)"
    axis.set(xlabel="training step", ylabel="usage entropy / log E", title=title, ylim=(0, 1.03))
    axis.figure.legend(loc="outside right upper")
    return axis.figure
