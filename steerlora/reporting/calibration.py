"""A calibration study: do the intervals of small studies hold, and do their verdicts come again?

Given the records of R replicates, every set of S of them is a small study, and the replicates that
it leaves out say what it should have found. Shapes: R replicates, S of a study, N studies.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from steerlora.engine.manifests import read_json
from steerlora.errors import UserError
from steerlora.evaluation.interval_methods import METHODS, Samples
from steerlora.evaluation.records import BASE, Ablation, DomainSequence, Evaluation, Record
from steerlora.evaluation.statistics import differ, ratio_estimate
from steerlora.reporting.claim_measures import measure_claims
from steerlora.reporting.claims import Studies
from steerlora.reporting.drawing import COLOURS, PAPER, STYLE, WIDTH, save
from steerlora.reporting.effects import uncontrolled
from steerlora.reporting.labels import BANNER
from steerlora.reporting.methods import Methods
from steerlora.reporting.quantities import Quantity, quantities
from steerlora.reporting.report import provenance_json
from steerlora.reporting.sequences import apart_by_replay
from steerlora.reporting.tables import (
    MISSING,
    Table,
    markdown_parts,
    number,
    page,
    row_of,
    write_table,
)
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    LEAST_AGAIN,
    NOT_MEASURED,
    NOT_REPRODUCED,
    UNDECIDED,
    VERDICTS,
    Judged,
)

FILE = "calibration.json"
MOST_STUDIES = 200
"""Of more sets of S replicates than these, so many are drawn."""
LEAST_COVERED, MOST_COVERED = 0.93, 0.97
"""Shares of the truth held, at which a 95 % interval counts as what it says."""
REFERENCE = "Student's t"
"""The method of the reports, whose width is 1."""
EVERY = "all"
"""The family of every quantity, and the claim of all of them."""


class Calibration(NamedTuple):
    """What a calibration study found, and where it was written."""

    directory: Path
    files: tuple[Path, ...]
    tables: dict[str, pd.DataFrame]
    """"coverage" and "verdicts", as in their CSV files."""
    covers: dict[int, list[str]]
    """{replicates: the interval methods that hold the truth as often as they say}."""
    verdicts: Studies
    """What `steerlora.reporting.report.write_report` shows beside a verdict."""


def write_calibration(
    directory: Path,
    *,
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    main_model: str,
    name: str,
    meaningful: bool,
    provenance: dict,
    sizes: Sequence[int] = (2, 3, 4, 5, 6),
) -> Calibration:
    """Write coverage, verdicts, a figure and provenance of a calibration study.

    Args:
        directory: made if need be.
        evaluations, ablations, sequentials, methods, main_model, name, meaningful, provenance: as
            for `steerlora.reporting.report.write_report`.
        sizes: replicates of the small studies; those that leave none out are passed over.

    Raises:
        UserError: there are fewer than three replicates.
    """
    provided = [*evaluations, *ablations, *sequentials]
    seeds = sorted({record.seed for record in provided if record.method != BASE})
    if len(seeds) < 3:
        raise UserError(
            f"a calibration study needs at least 3 replicates, and has {len(seeds)}: give "
            "study.seeds more"
        )
    sequentials = apart_by_replay(sequentials)
    records = (evaluations, ablations, sequentials)
    studies = {size: choose(len(seeds), size) for size in sizes if 2 <= size < len(seeds)}
    known = quantities(*records, methods, main_model=main_model)
    checked = [quantity for quantity in known if _varies(quantity, seeds)]
    coverage = coverage_table(measured_coverage(checked, studies), len(seeds), checked, known)
    judged = judgements(*records, methods, main_model, seeds, studies)
    verdicts = verdicts_table(judged, studies)

    directory.mkdir(parents=True, exist_ok=True)
    tables = [table for table in (coverage, verdicts) if table is not None]
    files = [
        file for table in tables for file in write_table(table, directory, meaningful=meaningful)
    ]
    with rc_context(STYLE):
        figure = coverage_figure(coverage.data)
        files.append(save(figure, directory / "coverage.png", meaningful=meaningful))
    everything = coverage.data[coverage.data.family == EVERY]
    covers = {
        int(size): rows[rows.covers == "yes"].method.tolist()
        for size, rows in everything.groupby("replicates")
    }
    counts = {
        claim: {
            size: _counts([one.verdict for one in found[claim]]) for size, found in judged.items()
        }
        for claim in next(iter(judged.values()))
    }
    document = {
        "name": name,
        "meaningful": meaningful,
        **({} if meaningful else {"banner": BANNER}),
        "replicates": len(seeds),
        "studies": {size: len(chosen) for size, chosen in studies.items()},
        "coverage": {
            method: dict(zip(map(int, rows.replicates), rows.scaled.round(4), strict=True))
            for method, rows in everything.dropna(subset="scaled").groupby("method", sort=False)
        },
        "covers": covers,
        "verdicts": counts,
    }
    texts = {
        FILE: json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "provenance.json": provenance_json(provenance, name, meaningful, provided),
        "calibration.md": _page(tables, covers, name, meaningful),
    }
    for file, text in texts.items():
        (directory / file).write_text(text, encoding="utf-8")
        files.append(directory / file)
    data = {table.name: table.data for table in tables}
    return Calibration(directory, tuple(files), data, covers, counts)


def read_studies(path: Path) -> Studies:
    """The verdicts that a calibration study saw, from its ``calibration.json``.

    Raises:
        UserError: there is no such file, or it is none of a calibration study.
    """
    content = read_json(path)
    try:
        return {
            claim: {int(size): dict(counts) for size, counts in by_size.items()}
            for claim, by_size in content["verdicts"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no file of a calibration study: {error!r}") from error


def choose(count: int, size: int) -> np.ndarray:
    """[N, S] sets of ``size`` of ``count`` replicates: all, or `MOST_STUDIES` at random.

    Random ones are drawn in pairs without a common replicate where there are enough, so that their
    verdicts can be compared.
    """
    if math.comb(count, size) <= MOST_STUDIES:
        return np.array(list(combinations(range(count), size)))
    generator = np.random.default_rng((count, size))
    chosen: dict[tuple[int, ...], None] = {}
    while len(chosen) < MOST_STUDIES:
        order = generator.permutation(count)
        for start in range(0, min(2 * size, count) - size + 1, size):
            chosen[tuple(sorted(order[start : start + size].tolist()))] = None
    return np.array(list(chosen)[:MOST_STUDIES])


def _varies(quantity: Quantity, seeds: list[int]) -> bool:
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


def judgements(
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    main_model: str,
    seeds: list[int],
    studies: dict[int, np.ndarray],
) -> dict[int, dict[str, list[Judged]]]:
    """{replicates: {claim: the verdict of every study}}, by the code of the reports."""
    plain = uncontrolled(evaluations)
    found: dict[int, dict[str, list[Judged]]] = {}
    for size, chosen in studies.items():
        by_claim: dict[str, list[Judged]] = {}
        for members in chosen:
            of = {seeds[place] for place in members}
            claims = measure_claims(
                _of(plain, of), _of(ablations, of), _of(sequentials, of), methods,
                main_model=main_model,
            )  # fmt: skip
            for claim in claims:
                by_claim.setdefault(claim.id, []).append(claim.judged)
        found[size] = by_claim
    return found


def _of(records: list[Record], seeds: set[int]) -> list[Record]:
    """Those of some replicates, and of bases that stand for every replicate."""
    bases = Counter(record.model for record in records if record.method == BASE)
    return [
        record
        for record in records
        if record.seed in seeds or (record.method == BASE and bases[record.model] == 1)
    ]


def verdicts_table(
    judged: dict[int, dict[str, list[Judged]]], studies: dict[int, np.ndarray]
) -> Table | None:
    """Which verdicts studies came to, and whether another study came to the same.

    Args:
        judged: by `judgements`.
        studies: which replicates each study has.
    """
    rows, totals = [], {}
    for size, found in judged.items():
        members = np.zeros((len(studies[size]), studies[size].max() + 1))
        np.put_along_axis(members, studies[size], 1.0, axis=1)
        apart = members @ members.T == 0
        for claim, ones in found.items():
            for rule, said in (
                (True, [one.verdict for one in ones]),
                (False, [one.by_intervals for one in ones]),
            ):
                if set(said) == {NOT_MEASURED}:
                    continue
                row = {"claim": claim, "replicates": size, "rule": rule}
                counts = _counts(said) | _compared(said, apart)
                total = totals.setdefault((size, rule), Counter())
                total.update(counts)
                rows.append(row | counts)
    rows += [
        {"claim": EVERY, "replicates": size, "rule": rule} | total
        for (size, rule), total in totals.items()
    ]
    if not rows:
        return None
    names = [*VERDICTS, "pairs", "alike", "otherwise"]
    data = pd.DataFrame(rows).reindex(columns=["claim", "replicates", "rule", *names]).fillna(0)
    total = data[list(VERDICTS)].sum(axis=1)
    shares = data[list(VERDICTS)].div(total, axis=0)
    data[list(VERDICTS)] = shares
    data.insert(3, "studies", total.astype(int))
    for name in ("alike", "otherwise"):
        data[name] = (data[name] / data.pairs).where(data.pairs > 0)
    of = data.set_index(["claim", "replicates", "rule"])
    cells = []
    for claim, size in dict.fromkeys(zip(data.claim, data.replicates, strict=True)):
        with_rule, alone = of.loc[claim, size, True], of.loc[claim, size, False]
        cells.append(
            row_of(
                claim,
                str(size),
                str(int(with_rule.studies)),
                *(number(with_rule[verdict], 2) for verdict in SHOWN),
                number(with_rule.alike, 2),
                number(with_rule.otherwise, 2),
                number(1 - alone[UNDECIDED] - alone[NOT_MEASURED], 2),
                number(alone.alike, 2),
                number(alone.otherwise, 2),
            )
        )
    caption = (
        "Verdicts: the share of studies of so many replicates that came to each. Alike and "
        "otherwise: of the pairs of studies without a common replicate of which one decided, how "
        "often the other decided the same, or the opposite. Intervals alone: the same without "
        f"the rule that a verdict stands only if another study would come to it with probability "
        f"{LEAST_AGAIN}."
    )
    headings = ["Claim", "Replicates", "Studies", *(name.capitalize() for name in SHOWN)]
    headings += ["Alike", "Otherwise", "Intervals alone: decided", "Alike", "Otherwise"]
    return Table("verdicts", caption, data, headings, cells)


SHOWN = (IN_RANGE, DIRECTION, NOT_REPRODUCED, UNDECIDED)
DECIDED = {IN_RANGE: 1, DIRECTION: 1, NOT_REPRODUCED: -1}


def _counts(said: Sequence[str]) -> dict[str, int]:
    """{verdict: how often it was reached}, without those that never were."""
    counted = Counter(said)
    return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}


def _compared(said: Sequence[str], apart: np.ndarray) -> dict[str, int]:
    """Pairs (a study that decided, another), how many decided the same, and how many otherwise.

    Args:
        said: [N] verdicts.
        apart: [N, N] whether two studies have no replicate in common.
    """
    side = np.array([DECIDED.get(verdict, 0) for verdict in said])
    both = side[:, None] * side[None, :] * apart
    return {
        "pairs": int((apart & (side != 0)[:, None]).sum()),
        "alike": int((both > 0).sum()),
        "otherwise": int((both < 0).sum()),
    }


def _page(tables: list[Table], covers: dict[int, list[str]], name: str, meaningful: bool) -> str:
    said = [
        f"- {size} replicates: {', '.join(found) if found else 'none'}"
        for size, found in covers.items()
    ]
    parts = [
        "Intervals that hold the truth as often as they say, by the replicates of a study:",
        "\n".join(said),
        "![Coverage by replicates and method](coverage.png)",
    ]
    for table in tables:
        parts += [
            f"## {table.name.capitalize()}",
            *markdown_parts(table),
            f"As [CSV]({table.name}.csv), [LaTeX]({table.name}.tex).",
        ]
    parts.append(
        f"For programs: [{FILE}]({FILE}). Where the numbers came from: "
        "[provenance.json](provenance.json)."
    )
    return page(parts, meaningful=meaningful, title=f"Calibration: {name}")
