"""A calibration study: do the intervals of small studies hold, and do their verdicts come again?

Given the records of R replicates, every set of S of them is a small study, and the replicates that
it leaves out say what it should have found. Shapes: R replicates, S of a study, N studies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context

from steerlora.engine.manifests import read_json
from steerlora.errors import UserError
from steerlora.evaluation.records import BASE, Ablation, DomainSequence, Evaluation
from steerlora.reporting.claims import Studies
from steerlora.reporting.coverage import (
    EVERY,
    coverage_figure,
    coverage_table,
    measured_coverage,
    varies,
)
from steerlora.reporting.drawing import STYLE, save
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.labels import BANNER
from steerlora.reporting.methods import Methods
from steerlora.reporting.quantities import quantities
from steerlora.reporting.report import provenance_json
from steerlora.reporting.sequences import apart_by_replay
from steerlora.reporting.stability import counted, judgements, verdicts_table
from steerlora.reporting.tables import Table, markdown_parts, page, write_table

FILE = "calibration.json"
MOST_STUDIES = 200
"""Of more sets of S replicates than these, so many are drawn."""


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
    checked = [quantity for quantity in known if varies(quantity, seeds)]
    coverage = coverage_table(measured_coverage(checked, studies), len(seeds), checked, known)
    judged = judgements(*records, methods, main_model, seeds, studies, meaningful=meaningful)
    verdicts = verdicts_table(judged, studies)

    directory.mkdir(parents=True, exist_ok=True)
    tables = [table for table in (coverage, verdicts) if table is not None]
    files = [
        file for table in tables for file in write_table(table, directory, meaningful=meaningful)
    ]
    with rc_context(STYLE):
        figure = coverage_figure(coverage.data)
        note = f"studies drawn from {replicates_text(seeds)}"
        files += save(figure, directory / "coverage.png", meaningful=meaningful, note=note)
    everything = coverage.data[coverage.data.family == EVERY]
    covers = {
        int(size): rows[rows.covers == "yes"].method.tolist()
        for size, rows in everything.groupby("replicates")
    }
    counts = {
        claim: {
            size: counted([one.verdict for one in found[claim]]) for size, found in judged.items()
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


def _page(tables: list[Table], covers: dict[int, list[str]], name: str, meaningful: bool) -> str:
    said = [
        f"- {size} replicates: {', '.join(found) if found else 'none'}"
        for size, found in covers.items()
    ]
    parts = [
        "Intervals that hold the truth as often as they say, by the replicates of a study:",
        "\n".join(said),
        "![Coverage by replicates and method](coverage.png)",
        "As [PDF](coverage.pdf).",
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
