"""Coverage: how often the intervals of small studies hold what the replicates left out give.

Shapes: Q quantities, R replicates, S of a study, N studies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from steerlora.evaluation.interval_methods import METHODS, Samples
from steerlora.evaluation.statistics import differ, ratio_estimate
from steerlora.reporting.drawing import COLOURS, PAPER, WIDTH
from steerlora.reporting.quantities import Quantity
from steerlora.reporting.tables import MISSING, Table, number, row_of

LEAST_COVERED, MOST_COVERED = 0.93, 0.97
"""Shares of the truth held, at which a 95 % interval counts as what it says."""
REFERENCE = "Student's t"
"""The method of the reports, whose width is 1."""
EVERY = "all"
"""The family of every quantity, and the claim of all of them."""


def varies(quantity: Quantity, seeds: list[int]) -> bool:
    """Whether a quantity is there in every replicate, and not the same in all of them."""
    measure = quantity.measure
    if list(measure.seeds) != seeds:
        return False
    above, below = _sides(quantity)
    ratio, _ = ratio_estimate(above, below)
    return bool(np.isfinite(ratio)) and differ(above - ratio * below)


def _sides(quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    """[R] numerator and denominator."""
    above = np.array(quantity.measure.numerator)
    below = quantity.measure.denominator
    return above, np.ones_like(above) if below is None else np.array(below)


def measured_coverage(checked: Sequence[Quantity], studies: dict[int, np.ndarray]) -> pd.DataFrame:
    """Of every quantity, study and method: does its interval hold what was left out of the study?

    Returns:
        Columns method, replicates, family, known (whether there is an interval), raw and scaled
        (whether it holds the mean of the others, without and with `_scale`), width (in units of
        that of Student's t).
    """
    sides = [_sides(quantity) for quantity in checked]
    errors = [np.array(quantity.measure.item_errors) for quantity in checked]
    parts = []
    for size, chosen in studies.items():
        others = np.ones((len(chosen), len(errors[0])))
        np.put_along_axis(others, chosen, 0.0, axis=1)
        truths = [(others @ above) / (others @ below) for above, below in sides]
        samples = [
            Samples(above[chosen], below[chosen], error[chosen])
            for (above, below), error in zip(sides, errors, strict=True)
        ]
        truth = np.array(truths)  # [Q, N], like all that follow
        value = np.array([ratio_estimate(one.numerator, one.denominator)[0] for one in samples])
        bounds = {
            name: np.array([method(one) for one in samples]).swapaxes(0, 1)
            for name, method in METHODS.items()
        }
        unit = np.ptp(bounds[REFERENCE], axis=0)
        for name, (low, high) in bounds.items():
            known = np.isfinite(low) & np.isfinite(high)
            held = {
                kind: np.where(known, _holds(truth, value, low, high, scale), np.nan).ravel()
                for kind, scale in (("raw", 1.0), ("scaled", _scale(size, len(errors[0]))))
            }
            width = np.divide(high - low, unit, where=unit > 0, out=np.full_like(unit, np.nan))
            columns = {"method": name, "replicates": size, "known": known.ravel(), **held}
            family = np.repeat([quantity.family for quantity in checked], len(chosen))
            parts.append(pd.DataFrame({**columns, "family": family, "width": width.ravel()}))
    return pd.concat(parts, ignore_index=True)


def _scale(size: int, count: int) -> float:
    """What makes up for the error of the mean of the others: ``sqrt(1 + S / (R - S))``.

    The two means differ by ``sigma sqrt(1/S + 1/(R - S))``, so for normal replicates Student's t,
    scaled, holds the mean of the others in exactly 95 % of studies.
    """
    return math.sqrt(1 + size / (count - size))


def _holds(
    truth: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray, scale: float
) -> np.ndarray:
    slack = 1e-9 * np.abs(truth)  # rounding is no miss
    low, high = value - scale * (value - low), value + scale * (high - value)
    return (low - slack <= truth) & (truth <= high + slack)


def coverage_table(
    measured: pd.DataFrame, count: int, checked: Sequence[Quantity], known: Sequence[Quantity]
) -> Table:
    """Coverage by method and replicates, of every family and of all quantities.

    Args:
        measured: by `measured_coverage`.
        count: R.
        checked, known: the quantities in it, and all that a report has.
    """
    both = pd.concat([measured.assign(family=EVERY), measured])
    groups = both.groupby(["method", "replicates", "family"], sort=False)
    data = groups.agg(
        known=("known", "mean"), raw=("raw", "mean"), scaled=("scaled", "mean"),
        width=("width", "median"),
    ).reset_index()  # fmt: skip
    data["covers"] = data.scaled.map(_covers)
    families = list(dict.fromkeys(quantity.family for quantity in checked))
    of = data.set_index(["method", "replicates", "family"])
    cells = [
        row_of(
            method,
            str(size),
            number(of.raw[method, size, EVERY]),
            number(of.scaled[method, size, EVERY]),
            of.covers[method, size, EVERY],
            number(of.width[method, size, EVERY], 2),
            *(number(of.scaled[method, size, family], 2) for family in families),
        )
        for method, size in dict.fromkeys(zip(data.method, data.replicates, strict=True))
    ]
    sizes = Counter(quantity.family for quantity in checked)
    caption = (
        f"Coverage: the share of studies of so many of {count} replicates whose 95 % interval "
        "holds the mean (of a ratio: the ratio of means) of the replicates left out, over "
        f"{len(checked)} numbers of the report. As it is, and with its half-width times "
        "sqrt(1 + S/(R − S)): the mean of the R − S left out has an error of its own, which "
        "this makes up for, so that a perfect t interval holds it in 95 % of studies. "
        f"Covers: {LEAST_COVERED} to {MOST_COVERED}. Width: median, in that of {REFERENCE}. "
        "By family, scaled: "
        + ", ".join(f"{family} ({sizes[family]})" for family in families)
        + "."
    )
    notes = [
        "Studies share replicates, and numbers share runs: the shares are no independent draws."
    ]
    if len(known) > len(checked):
        notes.append(
            f"Left out, being the same in all replicates or missing in some: "
            f"{len(known) - len(checked)} numbers."
        )
    headings = ["Interval", "Replicates", "As it is", "Scaled", "Covers", "Width", *families]
    return Table("coverage", caption, data, headings, cells, tuple(notes))


def _covers(share: float) -> str:
    if math.isnan(share):
        return MISSING
    if share < LEAST_COVERED:
        return "too narrow"
    return "too wide" if share > MOST_COVERED else "yes"


def coverage_figure(data: pd.DataFrame) -> Figure:
    """Scaled coverage of all quantities against the replicates of a study, a line a method."""
    axis = Figure(figsize=(WIDTH, 3.6)).subplots()
    axis.axhspan(LEAST_COVERED, MOST_COVERED, color=PAPER, alpha=0.5, zorder=0, label="nominal")
    rows = data[(data.family == EVERY) & data.scaled.notna()]
    for index, (method, own) in enumerate(rows.groupby("method", sort=False)):
        colour = COLOURS[index % len(COLOURS)]
        line = "o--" if method == REFERENCE else "o-"  # which another method may lie under
        axis.plot(own.replicates, own.scaled, line, color=colour, markersize=4, label=method)
    axis.set_xticks(sorted(rows.replicates.unique()))
    axis.grid(axis="y")
    axis.set(xlabel="replicates of a study", ylabel="share of 95 % intervals that hold")
    axis.set_title("Does a 95 % interval hold the mean of the replicates left out?")
    axis.figure.legend(loc="outside right upper")
    return axis.figure
