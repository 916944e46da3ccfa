"""Two results folders of one experiment, measure by measure: do they agree?

Another machine makes other numbers of the same command (`steerlora.engine.machine`). They agree
where no difference is larger than the intervals explain, and where no claim is decided two ways.

An interval is read as ``value ± t se`` with S - 1 degrees of freedom over S replicates. A pair of
them is compatible where ``|a - b| <= t sqrt(se_a^2 + se_b^2)`` with the degrees of freedom that
Welch (1947) gives the sum, which is where his test does not find the values different at 5 %.
Tables have hundreds of cells, one in twenty of which would fail by chance: of those only what
remains after Holm's adjustment counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.table import Table as TerminalTable
from rich.text import Text
from scipy import stats

from steerlora.engine.machine import built_by
from steerlora.engine.manifests import read_json
from steerlora.errors import UserError
from steerlora.evaluation.statistics import CONFIDENCE, holm, t_quantile
from steerlora.reporting.claims import DIRECTION, IN_RANGE, NOT_REPRODUCED
from steerlora.reporting.tables import MISSING, interval_text, markdown_grid, number, page, row_of
from steerlora.text import for_markdown, for_markup, for_terminal

CLAIMS = "claims.json"
LEVEL = 1 - CONFIDENCE
DECIDED = (IN_RANGE, DIRECTION, NOT_REPRODUCED)
COUNTS = ("seeds", "pairs")
"""Columns of tables that say over how many replicates a row is."""


class Reading(NamedTuple):
    """An estimate as a results folder states it. NaN bounds: no interval."""

    value: float
    low: float
    high: float
    replicates: int

    @property
    def error(self) -> float:
        """Its standard error; NaN where that is not known.

        Replicates that all gave one number, as few items can, say nothing about their spread.
        """
        half = (self.high - self.low) / 2
        if self.replicates < 2 or half <= 1e-12 * abs(self.value):
            return math.nan
        return half / float(t_quantile(self.replicates))

    def __str__(self) -> str:
        return interval_text(self[:3], 3)


@dataclass(frozen=True)
class Pair:
    """One quantity in both folders."""

    name: str
    """A measure's label; of a table's cell, its row and column."""
    first: Reading
    """In the first folder."""
    second: Reading
    """In the second."""

    @property
    def p_value(self) -> float:
        """Of Welch's test of equal values, two-sided; NaN where one has no interval."""
        test = stats.ttest_ind_from_stats(
            *(self.first.value, self.first.error * self.first.replicates**0.5),
            self.first.replicates,
            *(self.second.value, self.second.error * self.second.replicates**0.5),
            self.second.replicates,
            equal_var=False,
        )
        return float(test.pvalue)

    @property
    def compatible(self) -> bool | None:
        """Whether the intervals explain the difference; None where one has no interval."""
        return None if math.isnan(self.p_value) else self.p_value >= LEVEL


@dataclass(frozen=True)
class ClaimPair:
    """One claim in both folders."""

    id: str
    """``C1`` to ``C8``."""
    first: str
    """Its verdict in the first folder."""
    second: str
    """In the second."""
    measures: tuple[Pair, ...]
    """What both measured."""
    missing: tuple[str, ...]
    """Labels of measures that only one of the folders has."""

    @property
    def outcome(self) -> str:
        """``agree`` or ``differ``; ``undecided`` where a verdict is; ``other measures`` where the
        verdicts are not about the same."""
        if self.missing:
            return "other measures"
        if not {self.first, self.second} <= set(DECIDED):
            return "undecided"
        return "agree" if self.first == self.second else "differ"


@dataclass(frozen=True)
class TablePair:
    """The cells that one table has in both folders."""

    name: str
    """Of the table's files."""
    cells: tuple[Pair, ...]
    """Those with an interval or a standard error."""

    @property
    def apart(self) -> list[tuple[Pair, float]]:
        """Cells that are not compatible, with their p-values adjusted for the table's size."""
        adjusted = holm([cell.p_value for cell in self.cells])
        pairs = zip(self.cells, adjusted.tolist(), strict=True)
        return [(cell, p) for cell, p in pairs if cell.compatible is False]


@dataclass(frozen=True)
class Comparison:
    """Two results folders of one experiment."""

    folders: tuple[str, str]
    """The first and the second."""
    machines: tuple[str, str]
    """What built the artifacts of each."""
    meaningful: bool
    """Whether both may be read as results."""
    claims: tuple[ClaimPair, ...]
    """Those that both folders have."""
    tables: tuple[TablePair, ...]
    """Those that both folders have."""

    @property
    def differences(self) -> list[str]:
        """Why the folders do not agree, in a sentence each; none where they do."""
        pairs = [
            (f"{claim.id}, {pair.name}", pair)
            for claim in self.claims
            for pair in claim.measures
            if pair.compatible is False
        ]
        pairs += [
            (f"{table.name}.csv, {cell.name}", cell)
            for table in self.tables
            for cell, p in table.apart
            if p < LEVEL
        ]
        return [f"{name}: {pair.first} and {pair.second} do not fit" for name, pair in pairs] + [
            f"{claim.id}: {claim.first} in the first, {claim.second} in the second"
            for claim in self.claims
            if claim.outcome == "differ"
        ]

    @property
    def summary(self) -> str:
        """The answer in a sentence."""
        answers = [pair.compatible for claim in self.claims for pair in claim.measures]
        known = [answer for answer in answers if answer is not None]
        outcomes = [claim.outcome for claim in self.claims]
        verdicts = ", ".join(f"{outcomes.count(one)} {one}" for one in sorted(set(outcomes)))
        return (
            f"The results {'do not agree' if self.differences else 'agree'}: of the claims' "
            f"intervals {sum(known)} of {len(known)} pairs are compatible and "
            f"{len(answers) - len(known)} are not known; verdicts: {verdicts}."
        )


def compare(first: Path, second: Path) -> Comparison:
    """Compare two results folders: claims by id and label, tables by row and column.

    Raises:
        UserError: one has no claims, or they measured nothing alike.
    """
    documents = [read_json(folder / CLAIMS) for folder in (first, second)]
    ours, theirs = ({claim["id"]: claim for claim in each["claims"]} for each in documents)
    compared = Comparison(
        folders=(str(first), str(second)),
        machines=(_machines(first), _machines(second)),
        meaningful=all(each["meaningful"] for each in documents),
        claims=tuple(_claim(ours[id], theirs[id]) for id in ours if id in theirs),
        tables=tuple(
            TablePair(path.stem, tuple(_cells(path, second / path.name)))
            for path in sorted(first.glob("*.csv"))
            if (second / path.name).is_file()
        ),
    )
    if not any(claim.measures for claim in compared.claims):
        raise UserError(
            f"{first} and {second} have no measure of a claim in common: give two results of one "
            "experiment"
        )
    return compared


def _claim(first: dict[str, Any], second: dict[str, Any]) -> ClaimPair:
    ours, theirs = ({m["label"]: _reading(m) for m in each["measures"]} for each in (first, second))
    return ClaimPair(
        id=first["id"],
        first=first["verdict"],
        second=second["verdict"],
        measures=tuple(Pair(name, ours[name], theirs[name]) for name in ours if name in theirs),
        missing=tuple(name for name in {**ours, **theirs} if (name in ours) != (name in theirs)),
    )


def _reading(measure: dict[str, Any]) -> Reading:
    numbers = (measure[field] for field in ("value", "low", "high"))
    value, low, high = (math.nan if each is None else float(each) for each in numbers)
    return Reading(value, low, high, measure["seeds"])


def _cells(first: Path, second: Path) -> Iterator[Pair]:
    """The cells of a CSV file with an interval or a standard error, in both folders."""
    ours, theirs = _rows(first), _rows(second)
    for key in ours:
        for column in ours[key].index if key in theirs else ():
            cells = _cell(ours[key], column), _cell(theirs[key], column)
            if None not in cells:
                yield Pair(f"{' '.join(key)}, {column}", *cells)


def _rows(file: Path) -> dict[tuple[str, ...], pd.Series]:
    """{the texts of a row: the row}."""
    data = pd.read_csv(file).drop(columns="note", errors="ignore")
    texts = [name for name in data.columns if pd.api.types.is_string_dtype(data[name])]
    rows = {tuple(str(row[name]) for name in texts): row for _, row in data.iterrows()}
    assert len(rows) == len(data), f"{file}: {texts} do not tell rows apart"
    return rows


def _cell(row: pd.Series, column: str) -> Reading | None:
    """A cell that has an interval or a standard error beside it; None for any other."""
    value, count = row[column], next((row[name] for name in COUNTS if name in row.index), 1)
    bounds = [f"{column.removesuffix('_percent')}_{end}" for end in ("low", "high")]
    if set(bounds) <= set(row.index):
        return Reading(value, *row[bounds], count) if math.isfinite(value) else None
    error = row.get(f"{column}_stderr", math.nan)
    if not math.isfinite(error):
        return None
    half = error * float(t_quantile(count)) if count > 1 else math.nan
    return Reading(value, value - half, value + half, count)


def _machines(folder: Path) -> str:
    """What built the artifacts of a report, from its provenance."""
    file = folder / "provenance.json"
    recorded = read_json(file).get("built_by", []) if file.is_file() else []
    names = dict.fromkeys(str(built_by(entry) or "unknown") for entry in recorded)
    return "; ".join(names) or "unknown"


HEADINGS = ("Claim", "Measure", "First [95 % interval]", "Second", "Compatible", "Verdicts")
ANSWERS = {True: "yes", False: "no", None: "no interval"}
STYLES = {"yes": "green", "agree": "green", "no": "bold red", "differ": "bold red"}


def _lines(claim: ClaimPair) -> list[list[str]]:
    """A row a measure, with the claim's id and verdicts in the first."""
    rows = [
        ["", pair.name, str(pair.first), str(pair.second), ANSWERS[pair.compatible], ""]
        for pair in claim.measures
    ] or [["", *[MISSING] * 4, ""]]
    verdicts = dict.fromkeys((claim.first, claim.second))
    rows[0][0], rows[0][-1] = claim.id, f"{' / '.join(verdicts)}: {claim.outcome}"
    return rows


def comparison_terminal(comparison: Comparison) -> TerminalTable:
    """The claims of both folders for the terminal; what does not agree in red."""
    table = TerminalTable(*HEADINGS)
    for claim in comparison.claims:
        for *cells, answer, verdicts in _lines(claim):
            table.add_row(
                *map(for_markup, cells),
                Text(answer, style=STYLES.get(answer, "dim")),
                Text(for_terminal(verdicts), style=STYLES.get(claim.outcome, "dim")),
            )
    return table


def write_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """Write ``comparison.md`` and ``comparison.json``, and return their paths."""
    texts = {"comparison.md": _markdown(comparison), "comparison.json": _json(comparison)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def _markdown(comparison: Comparison) -> str:
    sides = zip(("First", "Second"), comparison.folders, comparison.machines, strict=True)
    places = (for_markdown(f"{side}: {folder}, built by {by}") for side, folder, by in sides)
    parts = ["\n".join(f"- {place}" for place in places)]
    parts.append(for_markdown(comparison.summary))
    if comparison.differences:
        parts.append("\n".join(f"- {for_markdown(line)}" for line in comparison.differences))
    claims = [row_of(*row) for claim in comparison.claims for row in _lines(claim)]
    parts += ["## Claims", markdown_grid(HEADINGS, claims)]
    apart = [
        row_of(table.name, cell.name, str(cell.first), str(cell.second), number(p))
        for table in comparison.tables
        for cell, p in table.apart
    ]
    answers = [cell.compatible for table in comparison.tables for cell in table.cells]
    known = len(answers) - answers.count(None)
    parts += [
        "## Tables",
        f"{len(apart)} of {known} pairs of cells are not compatible; chance alone would make about "
        f"{LEVEL * known:.0f} so. One counts as a difference where its p-value, adjusted for the "
        f"number of cells of its table (Holm), is below {LEVEL:.2f}.",
    ]
    if apart:
        headings = ("Table", "Cell", "First [95 % interval]", "Second", "p, adjusted")
        parts.append(markdown_grid(headings, apart))
    return page(parts, meaningful=comparison.meaningful, title="Two results of one experiment")


def _json(comparison: Comparison) -> str:
    sides = zip(("first", "second"), comparison.folders, comparison.machines, strict=True)
    document = {
        "agree": not comparison.differences,
        "differences": comparison.differences,
        "meaningful": comparison.meaningful,
        **{side: {"folder": folder, "built_by": by} for side, folder, by in sides},
        "claims": [
            {
                "id": claim.id,
                "verdicts": {"first": claim.first, "second": claim.second},
                "outcome": claim.outcome,
                "measures": _pairs(claim.measures),
                "measures_of_one": claim.missing,
            }
            for claim in comparison.claims
        ],
        "tables": {table.name: _pairs(table.cells) for table in comparison.tables},
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _pairs(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "label": pair.name,
            "first": _numbers(pair.first),
            "second": _numbers(pair.second),
            "compatible": pair.compatible,
        }
        for pair in pairs
    ]


def _numbers(reading: Reading) -> dict[str, float | int | None]:
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in reading._asdict().items()
    }
