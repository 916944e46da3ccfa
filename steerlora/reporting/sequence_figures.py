"""The figures of sequential adaptation: what is kept, what is lost, by which method.

Every function draws on a figure of its own and returns it, or None where its records are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerlora.evaluation.records import DomainSequence
from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import Interval, Runs, summary_mean
from steerlora.reporting.drawing import STYLE, WIDTH, heat_map
from steerlora.reporting.effects import select
from steerlora.reporting.labels import in_order
from steerlora.reporting.methods import Methods
from steerlora.reporting.own_method import LEAST_FINAL, LEAST_GENERAL, MOST_FORGETTING
from steerlora.reporting.sequences import (
    Read,
    final,
    forgotten,
    general_after,
    general_before,
    kept,
    mean,
    ordered,
)

MAX_ORDERS = 4
"""Orders in one figure; more would not be readable."""
MAX_METHODS = 4
"""Methods in one figure of matrices; of more, those that the report is about."""


def forgetting_matrices(
    sequentials: list[DomainSequence], model: str, methods: Methods
) -> Figure | None:
    """Scores after every stage: a row of heat maps a method, a column an order, seed means.

    Domains run in the order of learning, left to right, so stage i learns column i. At
    most `MAX_ORDERS` orders, and `MAX_METHODS` methods, are drawn.
    """
    records = select(sequentials, model=model)
    if not records:
        return None
    names = methods.sorted(record.method for record in records)
    first = in_order(names, (methods.baseline, methods.paper, methods.own, methods.dense))
    names = [name for name in names if name in first[:MAX_METHODS]]
    orders = in_order((record.order for record in records), ("broad_first", "broad_last"))
    orders = orders[:MAX_ORDERS]
    matrices = [
        np.mean(
            [ordered(r)[0] for r in select(records, method=name, order=order)] or [[[0]]],
            axis=0,
        )
        for name in names
        for order in orders
    ]
    low, high = min(m.min() for m in matrices), max(m.max() for m in matrices)
    with rc_context(STYLE):
        width = min(WIDTH, 1.4 + 3.0 * len(orders))
        figure = Figure(figsize=(width, 0.5 + 2.75 * len(names)))
        axes = figure.subplots(len(names), len(orders), squeeze=False)
        for row, name in enumerate(names):
            for column, order in enumerate(orders):
                axis = axes[row, column]
                found = select(records, method=name, order=order)
                if not found:
                    axis.axis("off")
                    continue
                sequence = found[0].sequence
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
                axis.set_title(f"{name}\n{order}", fontsize=9)
                axis.tick_params(labelsize=8)
                axis.tick_params(axis="x", rotation=90)
                if column == 0:
                    axis.set_ylabel("after stage")
        figure.colorbar(image, ax=axes, label="score", shrink=0.8, aspect=30)
    return figure


def pareto(sequentials: list[DomainSequence], model: str, methods: Methods) -> Figure | None:
    """Final average against positive forgetting: a point a method, its intervals, its runs faint.

    Below and to the right of the line, a method is beaten in both means by another.
    """
    records = select(sequentials, model=model)
    if not records:
        return None
    names = methods.sorted(record.method for record in records)
    runs = {name: select(records, method=name) for name in names}
    points = {name: (mean(runs[name], forgotten), mean(runs[name], final)) for name in names}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6))
        axis = figure.subplots()
        for name, (x, y) in points.items():
            across, up = ([read(r).value for r in runs[name]] for read in (forgotten, final))
            axis.plot(
                across, up, ".", color=methods.colour(name), alpha=0.3, markersize=4, zorder=0
            )
            axis.errorbar(
                x.value,
                y.value,
                xerr=_arms(x),
                yerr=_arms(y),
                elinewidth=1,
                label=methods.short_label(name),
                linestyle="none",
                zorder=2 if name in methods.variants else 3,
                **methods.marker(name),
            )
        (_, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        axis.set(xlim=(min(0.0, axis.get_xlim()[0]), right), ylim=(bottom, top))
        front = [points[name] for name in pareto_front(points)]
        across = [front[0][0].value, *(x.value for x, _ in front), right]
        up = [bottom, *(y.value for _, y in front), front[-1][1].value]
        axis.step(across, up, "--", where="post", color="#777777", lw=1, label="Pareto front")
        axis.grid()
        axis.set_axisbelow(True)
        axis.set_xlabel("positive forgetting, score (less is better)")
        axis.set_ylabel("final average (more is better)")
        axis.set_title(f"What is learnt against what is forgotten, {model} (faint: runs)")
        figure.legend(loc="outside right upper")
    return figure


def pareto_front(points: dict[str, tuple[Interval, Interval]]) -> list[str]:
    """Who is best up to its own forgetting: (forgetting, score) of each -> names, rising."""
    front: list[str] = []
    best = -np.inf
    for name in sorted(points, key=lambda name: (points[name][0].value, -points[name][1].value)):
        if points[name][1].value > best:
            front.append(name)
            best = points[name][1].value
    return front


def general_drift(sequentials: list[DomainSequence], model: str, methods: Methods) -> Figure | None:
    """Drift of general features after each stage: mean over runs with its interval, by method.

    Switches of our method are left out: they would hide the methods.
    """
    records = [r for r in select(sequentials, model=model) if r.drift]
    names = methods.sorted(record.method for record in records)
    names = [name for name in names if name not in methods.variants]
    if not names:
        return None
    stages = range(1, len(records[0].drift) + 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        axis = figure.subplots()
        for index, name in enumerate(names):
            bounds = [_drift(select(records, method=name), stage) for stage in stages]
            axis.errorbar(
                np.array(stages) + 0.04 * (index - (len(names) - 1) / 2),
                [interval.value for interval in bounds],
                np.hstack([_arms(interval) for interval in bounds]),
                elinewidth=1,
                label=name,
                **methods.marker(name) | {"markersize": 5},
            )
        axis.set_ylim(bottom=0)
        axis.set_xticks(stages)
        axis.grid(axis="y")
        axis.set_xlabel("domains learnt so far")
        axis.set_ylabel("drift of general features")
        axis.set_title(
            f"Change of general features, as a share of their power in the base, {model}"
        )
        figure.legend(loc="outside right upper")
    return figure


def _drift(records: Sequence[DomainSequence], stage: int) -> Interval:
    values = np.array([[record.drift[stage - 1]] for record in records])
    return summary_mean(Runs(values, np.zeros_like(values)), 0)


def method(sequentials: list[DomainSequence], model: str, methods: Methods) -> Figure | None:
    """Our method beside the others and its own switches: three scores with intervals and aims.

    The dots below are orders, means over seeds.
    """
    records = select(sequentials, model=model)
    names = methods.sorted(record.method for record in records)
    if methods.own not in names:
        return None
    runs = {name: select(records, method=name) for name in names}
    columns = [
        ("positive forgetting\n(less is better)", forgotten, MOST_FORGETTING),
        ("final average\n(more is better)", final, LEAST_FINAL),
    ]
    general = {name: kept(runs[name]) for name in names}
    shown = len(columns) + any(interval is not None for interval in general.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(names)))
        axes = figure.subplots(1, shown, sharey=True)
        for axis, (title, read, factor) in zip(axes, columns, strict=False):
            bounds = {name: mean(runs[name], read) for name in names}
            for row, name in enumerate(names):
                _dot(axis, row, methods, name, bounds[name], _by_order(runs[name], read))
            reference = bounds.get(methods.baseline)
            aim = factor * reference.value if reference is not None else None
            _finish(axis, title, aim, f"dashed: {factor:g} × {methods.baseline}'s")
        if shown > len(columns):
            for row, name in enumerate(names):
                _dot(
                    axes[-1], row, methods, name, general[name], _by_order(runs[name], _kept_share)
                )
            title = "general knowledge kept\n(more is better)"
            _finish(axes[-1], title, LEAST_GENERAL, f"dashed: {LEAST_GENERAL:g} of the base's")
        axes[0].set_yticks(range(len(names)), [methods.short_label(name) for name in names])
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        figure.suptitle(f"Sequential adaptation on {model}: means and 95 % intervals", fontsize=10)
    return figure


def _dot(
    axis: Axes,
    row: int,
    methods: Methods,
    name: str,
    interval: Interval | None,
    orders: Sequence[float],
) -> None:
    """A method's interval, and its orders below."""
    places = [row + 0.32] * len(orders)
    axis.plot(orders, places, ".", color=methods.colour(name), alpha=0.5, markersize=4)
    if interval is not None:
        style = {"elinewidth": 1.2, "capsize": 2.5} | methods.marker(name)
        axis.errorbar(interval.value, row, xerr=_arms(interval), **style)


def _finish(axis: Axes, title: str, aim: float | None, explained: str) -> None:
    if aim is not None:
        axis.axvline(aim, color="#777777", linestyle="--", lw=1, zorder=0)
        axis.set_xlabel(explained)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.set_title(title)
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def _by_order(records: Sequence[DomainSequence], read: Read) -> list[float]:
    """Means over seeds, an order each, of what is known."""
    found: dict[str, list[float]] = {}
    for record in records:
        score = read(record)
        if score is not None:
            found.setdefault(record.order, []).append(score.value)
    return [float(np.mean(values)) for values in found.values()]


def _kept_share(record: DomainSequence) -> Estimate | None:
    before, after = general_before(record), general_after(record)
    if before is None or after is None or not before.value:
        return None
    return Estimate(after.value / before.value, 0.0)


def _arms(interval: Interval) -> np.ndarray:
    """[2, 1] lengths of an error bar's arms."""
    arms = np.array([[interval.value - interval.low], [interval.high - interval.value]])
    return np.nan_to_num(arms).clip(min=0)
