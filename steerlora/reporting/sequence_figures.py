"""The figures of sequential adaptation: what is kept, what is lost, by which method.

Every function draws on a figure of its own and returns it, or None where its records are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import Interval
from steerlora.reporting.drawing import WIDTH, heat_map, outline
from steerlora.reporting.effects import by_method, select
from steerlora.reporting.labels import in_order
from steerlora.reporting.methods import Methods
from steerlora.reporting.own_method import LEAST_FINAL, LEAST_GENERAL, MOST_FORGETTING
from steerlora.reporting.sequences import final, forgotten, kept, mean

MAX_ORDERS = 4
"""Orders in one figure; more would not be readable."""
MAX_METHODS = 4
"""Methods in one figure of matrices; of more, those that the report is about."""


def forgetting_matrices(
    sequentials: list[DomainSequence], model: str, methods: Methods
) -> Figure | None:
    """Scores after every stage: a row of heat maps a method, a column an order, means of
    replicates.

    Columns are the domains, in the same order in every panel; a frame is around the one that a
    stage has just learnt. At most `MAX_ORDERS` orders, and `MAX_METHODS` methods, are drawn.
    """
    records = select(sequentials, model=model)
    if not records:
        return None
    names = methods.sorted(record.method for record in records)
    first = in_order(names, (methods.baseline, methods.paper, methods.own, methods.dense))
    names = [name for name in names if name in first[:MAX_METHODS]]
    orders = in_order((record.order for record in records), ("broad_first", "broad_last"))
    orders = orders[:MAX_ORDERS]
    found = {key: select(records, method=key[0], order=key[1]) for key in product(names, orders)}
    columns = in_order((d for r in records for d in r.sequence), records[0].domains)
    matrices = [
        _mean_matrix(runs, columns) if runs else np.zeros((0, 0)) for runs in found.values()
    ]
    scores = np.concatenate([matrix.ravel() for matrix in matrices])
    low, high = np.nanmin(scores), np.nanmax(scores)
    width = min(WIDTH, 1.4 + 3.0 * len(orders))
    figure = Figure(figsize=(width, 0.5 + 2.75 * len(names)))
    axes = figure.subplots(len(names), len(orders), squeeze=False)
    for axis, ((name, order), runs), matrix in zip(axes.flat, found.items(), matrices, strict=True):
        if not runs:
            axis.axis("off")
            continue
        sequence, leftmost = runs[0].sequence, order == orders[0]
        stages = ["base", *map(str, range(1, len(sequence) + 1))] if leftmost else None
        image = heat_map(axis, matrix, stages, columns, low, high, size=7)
        for stage, domain in enumerate(sequence, start=1):
            outline(axis, stage, columns.index(domain))
        axis.set_title(f"{name}\n{order}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="x", rotation=90)
        axis.set_ylabel("after stage" if leftmost else "")
    figure.colorbar(image, ax=axes, label="score", shrink=0.8, aspect=30)
    return figure


def _mean_matrix(records: Sequence[DomainSequence], columns: Sequence[str]) -> np.ndarray:
    """[T + 1, columns] scores after every stage, means over replicates; NaN: not scored."""
    matrices = []
    for record in records:
        scores = pd.DataFrame(record.matrix, columns=list(record.domains))
        matrices.append(scores.reindex(columns=columns).to_numpy())
    return np.mean(matrices, axis=0)


def pareto(sequentials: list[DomainSequence], model: str, methods: Methods) -> Figure | None:
    """Final average against positive forgetting: a point a method, its intervals, its runs faint.

    Below and to the right of the line, a method is beaten in both means by another.
    """
    runs = by_method(sequentials, model, methods)
    if not runs:
        return None
    points = {
        name: tuple(mean(own, read).interval for read in (forgotten, final))
        for name, own in runs.items()
    }
    axis = Figure(figsize=(WIDTH, 4.6)).subplots()
    for name, (x, y) in points.items():
        across, up = ([read(r).value for r in runs[name]] for read in (forgotten, final))
        axis.plot(across, up, ".", color=methods.colour(name), alpha=0.3, markersize=4, zorder=0)
        look = methods.marker(name) | {"linestyle": "none", "elinewidth": 1}
        look["zorder"] = 2 if name in methods.variants else 3
        label = methods.short_label(name)
        axis.errorbar(x.value, y.value, yerr=_arms(y), xerr=_arms(x), label=label, **look)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    axis.set(xlim=(min(0.0, left), right), ylim=(bottom, top))
    front = [points[name] for name in pareto_front(points)]
    across = [front[0][0].value, *(x.value for x, _ in front), right]
    up = [bottom, *(y.value for _, y in front), front[-1][1].value]
    axis.step(across, up, "--", where="post", color="#777777", lw=1, label="Pareto front")
    axis.grid()
    axis.set_axisbelow(True)
    axis.set(
        xlabel="positive forgetting, score (less is better)",
        ylabel="final average (more is better)",
        title=f"What is learnt against what is forgotten, {model} (faint: runs)",
    )
    axis.figure.legend(loc="outside right upper")
    return axis.figure


def pareto_front(points: dict[str, tuple[Interval, Interval]]) -> list[str]:
    """Who is best up to its own forgetting: (forgetting, score) of each -> names, rising."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0].value, -points[name][1].value)):
        if not front or points[name][1].value > points[front[-1]][1].value:
            front.append(name)
    return front


def general_drift(sequentials: list[DomainSequence], model: str, methods: Methods) -> Figure | None:
    """Drift of general features after each stage: mean with its interval, by method.

    Switches of our method are left out: they would hide the methods.
    """
    runs = by_method([record for record in sequentials if record.drift], model, methods)
    names = [name for name in runs if name not in methods.variants]
    if not names:
        return None
    stages = range(1, len(runs[names[0]][0].drift) + 1)
    axis = Figure(figsize=(WIDTH, 3.6)).subplots()
    for index, name in enumerate(names):
        bounds = [_drift(runs[name], stage) for stage in stages]
        places = np.array(stages) + 0.04 * (index - (len(names) - 1) / 2)
        values, arms = zip(*((interval.value, _arms(interval)) for interval in bounds), strict=True)
        look = methods.marker(name) | {"markersize": 5, "elinewidth": 1}
        axis.errorbar(places, values, np.hstack(arms), label=name, **look)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y")
    title = f"Change of general features, as a share of their power in the base, {model}"
    axis.set(xlabel="domains learnt so far", ylabel="drift of general features", title=title)
    axis.set_xticks(stages)
    axis.figure.legend(loc="outside right upper")
    return axis.figure


def _drift(records: Sequence[DomainSequence], stage: int) -> Interval:
    return mean(records, lambda record: Estimate(record.drift[stage - 1], np.nan)).interval


def method(sequentials: list[DomainSequence], model: str, methods: Methods) -> Figure | None:
    """Our method beside the others and its own switches: three scores with intervals and aims.

    The dots below are orders, means over replicates.
    """
    runs = by_method(sequentials, model, methods)
    if methods.own not in runs:
        return None
    columns = [
        ("positive forgetting\n(less is better)", forgotten, MOST_FORGETTING),
        ("final average\n(more is better)", final, LEAST_FINAL),
    ]
    if any(record.general for own in runs.values() for record in own):
        columns.append(("general knowledge kept\n(more is better)", _kept_share, LEAST_GENERAL))
    figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(runs)))
    axes = figure.subplots(1, len(columns), sharey=True)
    for axis, (title, read, factor) in zip(axes, columns, strict=True):
        of_base = read is _kept_share
        bounds = {name: kept(own) if of_base else mean(own, read) for name, own in runs.items()}
        for row, (name, measure) in enumerate(bounds.items()):
            scores = pd.Series([read(run).value for run in runs[name]])
            orders = scores.groupby([run.order for run in runs[name]], sort=False).mean()
            below = [row + 0.32] * len(orders)
            axis.plot(orders, below, ".", color=methods.colour(name), alpha=0.5, markersize=4)
            if measure is not None:
                interval = measure.interval
                style = {"elinewidth": 1.2, "capsize": 2.5} | methods.marker(name)
                axis.errorbar(interval.value, row, xerr=_arms(interval), **style)
        reference = bounds.get(methods.baseline)
        aim = factor if of_base else reference and factor * reference.interval.value
        if aim is not None:
            axis.axvline(aim, color="#777777", linestyle="--", lw=1, zorder=0)
            of = "of the base's" if of_base else f"× {methods.baseline}'s"
            axis.set_xlabel(f"dashed: {factor:g} {of}")
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.set_title(title)
        axis.grid(axis="x")
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(runs)), map(methods.short_label, runs))
    axes[0].set_ylim(len(runs) - 0.4, -0.6)
    figure.suptitle(f"Sequential adaptation on {model}: means and 95 % intervals", fontsize=10)
    return figure


def _kept_share(record: DomainSequence) -> Estimate:
    general = record.general
    known = general is not None and general.before.value
    return Estimate(general.after.value / general.before.value if known else np.nan, 0.0)


def _arms(interval: Interval) -> np.ndarray:
    """[2, 1] lengths of an error bar's arms."""
    arms = np.array([[interval.value - interval.low], [interval.high - interval.value]])
    return np.nan_to_num(arms).clip(min=0)
