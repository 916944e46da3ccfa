"""A table as people read it and as programs do: Markdown and LaTeX for one, CSV for the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import Interval, combined_error
from steerlora.reporting.labels import BANNER

MISSING = "–"


class Cell(NamedTuple):
    """One entry of a table for people."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table, twice."""

    name: str
    """File name without suffix."""
    caption: str
    """One or two sentences that say what the numbers are."""
    data: pd.DataFrame
    """Plain numbers, one row an observation; what the CSV file and W&B get."""
    columns: list[str]
    """Headings of the table for people."""
    rows: list[list[Cell]]
    """Its cells, one list a row."""
    notes: tuple[str, ...] = ()
    """Sentences to stand under the table."""


def write_table(table: Table, directory: Path, *, meaningful: bool) -> list[Path]:
    """Write ``<name>.md``, ``<name>.csv`` and ``<name>.tex`` into a directory.

    Args:
        meaningful: False puts the smoke-run banner on each of them; in CSV as a column ``note``.

    Returns:
        The files, in that order.
    """
    contents = {
        "md": markdown(table, meaningful=meaningful),
        "csv": (table.data if meaningful else table.data.assign(note=BANNER)).to_csv(index=False),
        "tex": latex(table, meaningful=meaningful),
    }
    files = [directory / f"{table.name}.{suffix}" for suffix in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(content, encoding="utf-8")
    return files


def markdown(table: Table, *, meaningful: bool) -> str:
    """The table in GitHub's Markdown: banner if need be, caption, table, notes."""
    parts = [] if meaningful else [f"> **{BANNER}**"]
    return "\n\n".join([*parts, *markdown_parts(table)]) + "\n"


def markdown_parts(table: Table) -> list[str]:
    """Caption, table and notes, a paragraph each."""
    parts = [table.caption, markdown_grid(table.columns, table.rows)]
    return [*parts, "\n".join(f"- {note}" for note in table.notes)] if table.notes else parts


def markdown_grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Heading, rule and rows; pipes in the text are escaped."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    body = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in rows]
    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, body)])


def latex(table: Table, *, meaningful: bool) -> str:
    """The table as a LaTeX ``table`` with booktabs rules, to be \\input."""
    caption = table.caption if meaningful else f"{BANNER.upper()}. {table.caption}"
    body = [
        " & ".join(
            f"\\textbf{{{escape(cell.text)}}}" if cell.best else escape(cell.text) for cell in row
        )
        for row in table.rows
    ]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        "\\small",
        f"\\caption{{{escape(caption)}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        "\\toprule",
        " & ".join(map(escape, table.columns)) + " \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in body),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"\\par {escape(note)}" for note in table.notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    | {"±": "$\\pm$", "−": "$-$", "–": "--", "Δ": "$\\Delta$", "≤": "$\\le$", "×": "$\\times$"}
)


def escape(text: str) -> str:
    """Text with LaTeX's special characters, and the few symbols used here, made safe."""
    return text.translate(LATEX)


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None or value != value:
        return MISSING
    # Adding zero after rounding turns -0.0 into 0.0.
    text = f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")


def interval_text(
    bounds: Sequence[float], digits: int, unit: str = "", *, sign: bool = False
) -> str:
    """``value unit [low, high]`` of (value, low, high); only what of it is known."""
    value, low, high = (number(bound, digits, sign=sign) for bound in bounds[:3])
    if value == MISSING:
        return MISSING
    known = MISSING not in (low, high)
    return f"{value}{unit} [{low}, {high}]" if known else f"{value}{unit}"


def plus_minus(value: float, error: float) -> str:
    """``value ± error``, or the value alone where the error is not known."""
    text = number(value)
    return text if MISSING in (text, number(error)) else f"{text} ± {number(error)}"


def mean_and_error(name: str, scores: Sequence[Estimate | None]) -> dict[str, float]:
    """Columns ``name`` and ``name_stderr`` of a CSV file: scores of several seeds, or NaN."""
    known = [score for score in scores if score is not None]
    if not known:
        return {name: np.nan, f"{name}_stderr": np.nan}
    values, errors = [score.value for score in known], [score.stderr for score in known]
    return {name: float(np.mean(values)), f"{name}_stderr": combined_error(values, errors)}


def interval_fields(name: str, interval: Interval | None, unit: str = "") -> dict[str, float]:
    """Columns ``name(_unit)``, ``name_low`` and ``name_high`` of a CSV file."""
    value, low, high = interval[:3] if interval is not None else (np.nan,) * 3
    return {f"{name}_{unit}" if unit else name: value, f"{name}_low": low, f"{name}_high": high}


def best_cells(values: Sequence[float], errors: Sequence[float], *, meaningful: bool) -> list[bool]:
    """Which of the values is the best by more than the two standard errors explain; often none.

    The best leads if it exceeds the runner-up by more than ``sqrt(error_1^2 + error_2^2)``.
    """
    order = sorted(
        (index for index, value in enumerate(values) if value == value),
        key=lambda index: -values[index],
    )
    marks = [False] * len(values)
    if meaningful and len(order) > 1:
        first, second = order[:2]
        spread = (errors[first] ** 2 + errors[second] ** 2) ** 0.5
        marks[first] = values[first] - values[second] > spread
    return marks
