"""A table as people read it and as programs do: Markdown and LaTeX for one, CSV for the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from steerlora.evaluation.scores import Estimate
from steerlora.evaluation.statistics import replicates_error
from steerlora.reporting.effects import Measure
from steerlora.reporting.labels import BANNER
from steerlora.text import for_latex, for_markdown

MISSING = "–"
ERROR = "of items alone where there is one replicate"
"""What a standard error is that is not over replicates, for captions."""
OVER = "95 % interval over replicates"
"""What the brackets behind a number are, for captions."""


class Cell(NamedTuple):
    """One entry of a table for people."""

    text: str
    best: bool = False


def row_of(*entries: str | Cell) -> list[Cell]:
    """A row of a table for people; text alone is not the best of anything."""
    return [Cell(entry) if isinstance(entry, str) else entry for entry in entries]


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
        "md": page(markdown_parts(table), meaningful=meaningful),
        "csv": (table.data if meaningful else table.data.assign(note=BANNER)).to_csv(index=False),
        "tex": latex(table, meaningful=meaningful),
    }
    files = [directory / f"{table.name}.{suffix}" for suffix in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(content, encoding="utf-8")
    return files


def page(parts: Sequence[str], *, meaningful: bool, title: str = "") -> str:
    """A file in Markdown: its title, the banner of a smoke run, and paragraphs."""
    head = [f"# {for_markdown(title)}"] if title else []
    head += [] if meaningful else [f"> **{BANNER}**"]
    return "\n\n".join([*head, *parts]) + "\n"


def markdown_parts(table: Table) -> list[str]:
    """Caption, table in GitHub's Markdown, and notes, a paragraph each."""
    parts = [for_markdown(table.caption), markdown_grid(table.columns, table.rows)]
    notes = "\n".join(f"- {for_markdown(note)}" for note in table.notes)
    return [*parts, notes] if notes else parts


def markdown_grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Heading, rule and rows, whatever text is in them."""

    def line(cells: Sequence[Cell]) -> str:
        texts = [(for_markdown(cell.text), cell.best) for cell in cells]
        return "| " + " | ".join(f"**{text}**" if best else text for text, best in texts) + " |"

    return "\n".join(map(line, [row_of(*columns), row_of(*["---"] * len(columns)), *rows]))


def latex(table: Table, *, meaningful: bool) -> str:
    """The table as a LaTeX ``table`` with booktabs rules, to be \\input."""

    def line(cells: Sequence[Cell]) -> str:
        texts = [(for_latex(cell.text), cell.best) for cell in cells]
        return " & ".join(f"\\textbf{{{t}}}" if best else t for t, best in texts) + " \\\\"

    caption = table.caption if meaningful else f"{BANNER.upper()}. {table.caption}"
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        "\\small",
        f"\\caption{{{for_latex(caption)}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        "\\toprule",
        line(row_of(*table.columns)),
        "\\midrule",
        *map(line, table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"\\par {for_latex(note)}" for note in table.notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


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


def mean_and_error(name: str, scores: Sequence[Estimate | None]) -> dict[str, float]:
    """Columns ``name`` and ``name_stderr`` of a CSV file, of one score a replicate; NaN: none."""
    known = [score for score in scores if score is not None]
    if not known:
        return {name: np.nan, f"{name}_stderr": np.nan}
    values, errors = [score.value for score in known], [score.stderr for score in known]
    return {name: float(np.mean(values)), f"{name}_stderr": replicates_error(values, errors)}


def mean_text(row: pd.Series, name: str) -> str:
    """What `mean_and_error` has put into a row: ``value ± error``, or what of it is known."""
    text, error = number(row[name]), number(row[f"{name}_stderr"])
    return text if MISSING in (text, error) else f"{text} ± {error}"


def interval_fields(name: str, measure: Measure | None) -> dict[str, float]:
    """Columns ``name``, ``name_low`` and ``name_high`` of a CSV file; ``_percent`` of a name is
    left out of the bounds' columns."""
    value, low, high = measure.interval[:3] if measure is not None else (np.nan,) * 3
    bounds = name.removesuffix("_percent")
    return {name: value, f"{bounds}_low": low, f"{bounds}_high": high}


def row_interval(row: pd.Series | dict, name: str, digits: int, *, sign: bool = False) -> str:
    """What `interval_fields` has put into a row, as `interval_text`."""
    bounds = name.removesuffix("_percent")
    unit = " %" if name.endswith("_percent") else ""
    values = row[name], row[f"{bounds}_low"], row[f"{bounds}_high"]
    return interval_text(values, digits, unit, sign=sign)


def leaders(
    data: pd.DataFrame, name: str, by: Sequence[str], *, meaningful: bool, lowest: bool = False
) -> set[int]:
    """Index of the rows that are the best of their group in a column, by `best_cells`."""
    found: set[int] = set()
    for _, part in data.groupby(list(by), sort=False):
        values = -part[name] if lowest else part[name]
        marks = best_cells(values.tolist(), part[f"{name}_stderr"].tolist(), meaningful=meaningful)
        found.update(part.index[marks])
    return found


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
