"""What came of a sweep: a row a job, the settings that vary and the scores as columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.table import Column, Table

from steerlora.engine.lineage import Library, read
from steerlora.errors import UserError
from steerlora.reporting.run_figures import is_headline
from steerlora.reporting.run_rows import RunRow, best, figure_text, row_of
from steerlora.text import for_markup


class Line(NamedTuple):
    """A job's artifact, or a job without one."""

    job: int
    """Its number in the sweep, from 0."""
    varied: dict[str, str]
    """{key that the sweep varies: the job's value}."""
    seconds: float
    """Wall time of the job."""
    outcome: str
    """"done", or why it failed."""
    row: RunRow | None
    """What was asked for; None where the job failed, or was an experiment."""


def rows_in(folders: Sequence[str]) -> list[RunRow | None]:
    """The rows of the artifacts that a job was asked for; one None where there are none."""
    found: list[RunRow | None] = []
    for folder in map(Path, folders):
        artifact = read(folder)
        try:
            found += [row_of(artifact, Library(folder.parents[1]))] if artifact else []
        except UserError:  # a record of another version: the job's line needs no scores
            continue
    return found or [None]


def headlines(rows: Sequence[RunRow | None]) -> list[str]:
    """The figures that a table for people shows, in the order in which they come."""
    names = dict.fromkeys(name for row in rows if row is not None for name in row.figures)
    return [name for name in names if is_headline(name)]


def heading(name: str) -> str:
    """What a table for people calls a figure."""
    return name.removeprefix("average/").replace("_", " ")


def sweep_table(lines: Sequence[Line], written: Path | None) -> Table:
    """The table for the terminal; the best score of a column is bold.

    Args:
        written: file with all figures, for the caption.
    """
    rows = [line.row for line in lines]
    keys = list(dict.fromkeys(key for line in lines for key in line.varied))
    names = headlines(rows)
    seconds = Column("seconds", justify="right")
    notes = ["± standard error over items", "bold: the best of its column"] if names else []
    notes += [] if written is None else [f"all figures: {written}"]
    table = Table(
        *(
            "job",
            *map(for_markup, keys),
            *(for_markup(heading(name)) for name in names),
            seconds,
            "outcome",
        ),
        title="sweep",
        caption=for_markup("; ".join(notes)),
    )
    marked = {name: best(rows, name) for name in names}
    for place, line in enumerate(lines):
        scores = []
        for name in names:
            text = figure_text(line.row.figures.get(name) if line.row else None)
            scores.append(f"[bold]{text}[/bold]" if marked[name] == place else text)
        table.add_row(
            str(line.job),
            *(for_markup(line.varied.get(key, "")) for key in keys),
            *scores,
            f"{line.seconds:.1f}",
            for_markup(line.outcome),
        )
    return table


def sweep_data(lines: Sequence[Line]) -> pd.DataFrame:
    """All of it as plain numbers: every figure and its standard error, the artifacts' names."""
    return pd.DataFrame([_entry(line) for line in lines])


def _entry(line: Line) -> dict[str, Any]:
    entry: dict[str, Any] = {"job": line.job, **line.varied}
    entry |= {"stage": None, "fingerprint": None}
    if line.row is not None:
        artifact = line.row.artifact
        entry |= {"stage": artifact.stage, "fingerprint": artifact.fingerprint}
        for name, figure in line.row.figures.items():
            entry[name] = figure.value
            if figure.stderr is not None:
                entry[f"{name}_stderr"] = figure.stderr
    return entry | {"seconds": round(line.seconds, 3), "outcome": line.outcome}
