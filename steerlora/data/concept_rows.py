"""Texts with and without concepts, as in AxBench's tables (Wu et al. 2025, arXiv 2501.17148).

R texts, C concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from steerlora.data.jsonl import file_of, in_folder, read_objects, stem_of
from steerlora.data.labelled import TEST, TRAIN
from steerlora.errors import UserError

COLUMNS = {
    "input": str,
    "output": str,
    "output_concept": str,
    "category": str,
    "concept_genre": str,
    "concept_id": int,
}
"""Those that are read."""
POSITIVE = "positive"
SHARED = -1
"""The concept of rows that have none, and are negative for all of their genre."""


class ConceptRow(NamedTuple):
    """An instruction and its answer; ``positive``: the answer has the concept."""

    prompt: str
    response: str
    concept: int
    genre: str
    positive: bool


class ConceptText(NamedTuple):
    """A table, in training and in the test."""

    name: str
    concepts: dict[int, str]
    """{number: what it is of}."""
    train: tuple[ConceptRow, ...]
    test: tuple[ConceptRow, ...]

    def training(self, concept: int) -> tuple[list[int], list[int]]:
        """Rows of ``train`` with a concept, and those without any in its genre."""
        own = [i for i, row in enumerate(self.train) if row.concept == concept and row.positive]
        genre = self.train[own[0]].genre
        without = [
            i for i, row in enumerate(self.train) if row.concept == SHARED and row.genre == genre
        ]
        return own, without

    def testing(self, concept: int) -> tuple[list[int], list[int]]:
        """Rows of ``test`` with a concept, and those that are tests of it and do not have it."""
        own = [i for i, row in enumerate(self.test) if row.concept == concept]
        return (
            [i for i in own if self.test[i].positive],
            [i for i in own if not self.test[i].positive],
        )


def concept_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """{name: (``<name>_train``, ``<name>_test``)} of the tables of a folder.

    Only files count whose first row has the columns, so that others may lie beside them.

    Raises:
        UserError: there is none.
    """
    stems = [stem_of(path) for path in in_folder(folder)] if folder.is_dir() else []
    found = {}
    for stem in stems:
        name = stem.removesuffix(TRAIN)
        pair = file_of(folder, stem), file_of(folder, f"{name}{TEST}")
        if stem.endswith(TRAIN) and f"{name}{TEST}" in stems and all(map(_has_columns, pair)):
            found[name] = pair
    if not found:
        raise UserError(
            f"{folder}: no folder with <name>{TRAIN}.jsonl and <name>{TEST}.jsonl whose rows have "
            f"{', '.join(COLUMNS)}"
        )
    return found


def _has_columns(path: Path) -> bool:
    first = next((row for _, row in read_objects(path)), {})
    return all(isinstance(first.get(name), kind) for name, kind in COLUMNS.items())


def read_concepts(name: str, files: Sequence[Path]) -> ConceptText:
    """A table of :func:`concept_files`.

    Raises:
        UserError: a row lacks a column, or no concept has rows with and without it in both parts.
    """
    names: dict[int, str] = {}
    train, test = (tuple(_row(place, row, names) for place, row in read_objects(f)) for f in files)
    whole = ConceptText(name, names, train, test)
    kept = {
        number: text
        for number, text in sorted(names.items())
        if all(len(rows) > 1 for rows in (*whole.training(number), *whole.testing(number)))
    }
    if not kept:
        raise UserError(
            f"{files[0]}: no concept has two rows with it and two without, here and in {files[1]}"
        )
    return whole._replace(concepts=kept)


def _row(place: str, row: dict, names: dict[int, str]) -> ConceptRow:
    for column, kind in COLUMNS.items():
        if not isinstance(row.get(column), kind):
            raise UserError(f"{place}: {column} is missing, or is not {kind.__name__}")
    positive = row["category"] == POSITIVE
    if positive:
        names.setdefault(row["concept_id"], row["output_concept"])
    return ConceptRow(
        row["input"], row["output"], row["concept_id"], row["concept_genre"], positive
    )
