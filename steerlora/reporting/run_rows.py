"""Artifacts as rows: what each was built with, and what it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from steerlora.engine.artifacts import Artifact
from steerlora.engine.lineage import Library, read
from steerlora.errors import UserError
from steerlora.evaluation.records import Ablation, DomainSequence, Evaluation, find_record
from steerlora.reporting.run_figures import LOWER, Figure, figures_of
from steerlora.reporting.settings import Setting, settings_of
from steerlora.reporting.tables import MISSING, number

SWEEPS = "sweeps"
"""Folder, under the artifacts' root, of the tables that sweeps leave."""

SHORTEST = 4  # digits of a fingerprint that is cut short


@dataclass(frozen=True)
class RunRow:
    """One artifact, its flat settings and its figures."""

    artifact: Artifact
    settings: dict[str, Setting]
    """As `steerlora.reporting.settings` has them."""
    figures: dict[str, Figure]
    """As `steerlora.reporting.run_figures` names them."""
    record: Evaluation | Ablation | DomainSequence | None
    """What the stage wrote for reports; None where it writes no record."""

    @property
    def scored(self) -> bool:
        """Whether something was trained or scored, and not only written or harvested."""
        return self.record is not None or any(n.startswith("throughput/") for n in self.figures)


def row_of(artifact: Artifact, library: Library, *, seed: int | None = None) -> RunRow:
    """The row of an artifact whose ancestors are in the library.

    Args:
        seed: of the replicate of a study that the artifact is of, if it is of one: the record's
            seed then.

    Raises:
        UserError: its record has another schema than this version reads.
    """
    record = find_record(artifact.path)
    if seed is not None and record is not None:
        record = replace(record, seed=seed)
    figures = figures_of(artifact.stage, artifact.manifest.get("summary", {}), record)
    return RunRow(artifact, settings_of(library.ancestry(artifact)), figures, record)


def named(names: Iterable[str], library: Library) -> list[Artifact]:
    """The artifacts that a user means.

    Args:
        names: fingerprints (their beginnings will do), folders of artifacts, and sweeps: the name
            or the file of the table that one left.

    Raises:
        UserError: a name stands for nothing, or for several artifacts.
    """
    found = [artifact for name in names for artifact in _named(name, library)]
    return list({artifact.fingerprint: artifact for artifact in found}.values())


def _named(name: str, library: Library) -> Iterator[Artifact]:
    folder = Path(name).expanduser()
    if folder.is_dir() and (artifact := read(folder.absolute())):
        yield artifact
        return
    tables = (folder, library.root / SWEEPS / f"{name}.csv")
    table = next((path for path in tables if path.is_file()), None)
    if table is not None:
        for fingerprint in _fingerprints(table):
            if (artifact := library.find(fingerprint)) is None:
                raise UserError(f"runs: {name} names {fingerprint}, which is not stored any more")
            yield artifact
        return
    stored = list(library.all())
    hits = [one for one in stored if len(name) >= SHORTEST and one.fingerprint.startswith(name)]
    if len(hits) != 1:
        what = f"stands for {len(hits)} artifacts" if hits else "is no artifact and no sweep"
        raise UserError(
            f"runs: {name} {what} under {library.root}: give fingerprints, folders or sweeps; "
            "steerlora stage=runs lists them"
        )
    yield hits[0]


def _fingerprints(table: Path) -> list[str]:
    """The artifacts of a sweep, as its table has them."""
    try:
        data = pd.read_csv(table, dtype=str)
        return [name for name in data["fingerprint"] if isinstance(name, str)]
    except (KeyError, ValueError) as error:
        raise UserError(f"runs: {table} is not the table of a sweep") from error


def figure_text(figure: Figure | None, digits: int = 3) -> str:
    """``0.533 ± 0.020``, or what of it is known."""
    if figure is None:
        return MISSING
    if abs(figure.value) >= 1000:
        return f"{figure.value:,.0f}"
    text = number(figure.value, digits)
    return text if figure.stderr is None else f"{text} ± {number(figure.stderr, digits)}"


def best(rows: list[RunRow | None], name: str) -> int | None:
    """Which row has the best value of a figure; None where no value is better than another."""
    values = {
        place: row.figures[name].value
        for place, row in enumerate(rows)
        if row is not None and name in row.figures
    }
    if name.startswith(("drop_pct/", "throughput/")) or len(set(values.values())) < 2:
        return None
    pick: Callable = min if name in LOWER else max
    return pick(values, key=values.__getitem__)
